"""MARS by kernels, where `test_kernel_passes` does not look: without its norm, before the first gradient, with Muon."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt import Mars, Recipe, ShardedOptimizer, rules
from shardopt.kernels import cpu, cuda, key_at
from shardopt.kernels.cache import NoCompiler
from tests.fake_gpu import emulated
from tests.kernel_kit import differences

SHAPES = ((70, 130), (4, 32, 48), (12, 512), (40,), (0, 64))
UNCLIPPED = Recipe(
    rules.AdamW(lr=1e-2, betas=(0.83, 0.957)), {"signed": "sqrt8", "non_negative": "root4"}, [Mars(clip=False), "decay"]
)
MUON = Recipe(rules.Muon(lr=0.02), "int8", [Mars(gamma=0.05), "cautious"], "kahan", "stored")


def stepped(recipe, fused, shapes=SHAPES, dtype=torch.float32, first=None):
    torch.manual_seed(5)
    ps = [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes]
    opt = ShardedOptimizer(ps, recipe, fused=fused)
    for step in range(4):
        for p in ps:
            p.grad = torch.randn(p.shape).to(dtype)
        if first is not None and not step:
            ps[0].grad[3, 5], ps[3].grad[7] = first, -first
        if step == 2:  # as a scheduler does
            name = "betas" if "betas" in opt.param_groups[0] else "momentum"
            opt.param_groups[0][name] = {"betas": (torch.tensor(0.7), 0.9), "momentum": 0.8}[name]
        opt.step()
    if fused:
        assert (opt.native.stepped, opt.native.left) == (len(ps), 0)
    return [{"p": p.detach(), **opt.state[p]} for p in ps]


@pytest.mark.parametrize("on", ["cpu", "lanes"])
@pytest.mark.parametrize("first", [None, float("inf"), float("nan")])
def test_without_its_norm(on, first, monkeypatch):
    """One pass, bit by bit. Kills: a last gradient of zero before the first step, or one that is multiplied by 0; a
    weight from the recipe's beta; the corrected gradient stored in place of the gradient; the slot of the rule."""
    if on == "lanes":
        monkeypatch.setattr(cpu, "load", emulated)
    for one, other in zip(stepped(UNCLIPPED, False, first=first), stepped(UNCLIPPED, True, first=first)):
        assert differences(one, other) == []


def test_with_muon():
    """MARS-M: what is sent is of the corrected gradient, and its slot is stored by the last pass alone. Kills: a
    correction left out of what is sent, the compensation's slot taken for the gradient's, a gradient that is read back
    before it was stored."""
    shapes = [shape for shape in SHAPES if len(shape) > 1]
    for one, other in zip(*(stepped(MUON, fused, shapes, torch.bfloat16) for fused in (False, True))):
        assert differences(one, other) == []


@pytest.mark.parametrize("recipe, arch", [(UNCLIPPED, "sm_80"), (MUON, "sm_90"), (MUON, "sm_100")])
def test_compiles_without_spills(recipe, arch):
    """Kills: what a slot more costs in registers."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    key = key_at(recipe, (4096, 4096), torch.bfloat16, torch.bfloat16)
    cuda.compiled(key, arch)
    report = cuda.entry_of(key, arch).facts()["report"]
    assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), report


def test_a_mars_of_ones_own_has_no_kernel():
    """Kills: a subclass that is taken for its parent."""

    class Own(Mars):
        pass

    with pytest.raises(ValueError, match="add-on mars has no native twin"):
        shardopt.AdamW([nn.Parameter(torch.ones(2))], addons=[Own()], fused=True)
