"""Muon's kin by kernels: what belongs to rows, matrices and blocks is the rule's, the elements are the kernel's."""

import pytest
import torch
from torch import nn

from shardopt import Recipe, ShardedOptimizer, rules
from shardopt.kernels import cuda, key_at, native
from shardopt.kernels.cache import NoCompiler
from tests.fake_gpu import gpu  # noqa: F401
from tests.kernel_kit import differences
from tests.test_kernel_passes import check

SHAPES = ((70, 130), (4, 32, 48), (66, 9, 3, 3), (330, 64), (3, 300, 320))
KAON = {"sign": False, "scale": "clip"}
# options of the rule and the rest of the recipe: one C++ type a kind, whose options are the rule's own business
KINDS = {
    "normuon": (
        rules.NorMuon,
        ({"eps": 1e-3}, {"adjust_lr": "rms_rescale", "beta2": 0.7}, {"split": 2, "adjust_lr": "match_rms_adamw"}),
        ("int8", ("mars", "cautious_decay"), "kahan"),
    ),
    "rescaled": (
        rules.Muon,
        ({}, {"split": (1, 1)}, {"split": 2}),
        ("sqrt8", ("rms_clip", "decay"), "stochastic", "stored"),
    ),
    "adamuon": (
        rules.AdaMuon,
        ({"beta2": 0.8}, {"split": 2, "eps": 1e-2}),
        ({"signed": "int8", "non_negative": "root4(block=64)"}, ("cautious",), "nearest", "stored"),
    ),
    "kaon": (
        rules.AdaMuon,
        ({**KAON, "atan2": True}, {**KAON, "atan2": True, "beta2": 0.7, "split": 2}),
        ({"signed": "int8", "non_negative": "factored"}, ("gradient_centralization", "decay"), "nearest"),
    ),
}
BF16 = ("normuon", "rescaled")
CASES = [(kind, i) for kind, (_, options, _) in KINDS.items() for i in range(len(options))]


def recipe(kind, which=0):
    rule, options, rest = KINDS[kind]
    more = {"adjust_lr": "rms_rescale"} if kind == "rescaled" else {}
    return Recipe(rule(lr=0.03, **options[which], **more), *rest)


def stepped(kind, which, fused):
    made = recipe(kind, which)
    dtype = torch.bfloat16 if kind in BF16 else torch.float32
    torch.manual_seed(5)
    shapes = [shape for shape in SHAPES if made.rule.split != (1, 1) or shape[-2] == 2]
    ps = [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in shapes or ((2, 4000), (5, 2, 600))]
    decay = {"weight_decay": 0.1} if any("decay" in addon.name for addon in made.addons) else {}
    groups = [{"params": ps[::2], **decay}, {"params": ps[1::2], "lr": torch.tensor(0.02), **decay}]
    opt = ShardedOptimizer(groups, made, fused=fused)
    for step in range(3):
        for p in ps:
            p.grad = torch.randn(p.shape).to(dtype)
        if step == 1:
            ps[0].grad.zero_()
        opt.step()
    if fused:
        assert (opt.native.stepped, opt.native.left, len(set(opt.native.ran))) == (len(ps), 0, 1)
    return [{"p": p.detach(), **opt.state[p]} for p in ps]


@pytest.mark.parametrize("kind, which", CASES)
def test_equals_the_reference(kind, which):
    """Bit by bit: of these shapes no sum differs that decides. Kills: a factor of another row, matrix or block, of o in
    place of what it became, the rows' moment stored with its slot's neighbours or before the step, a factored moment of
    x in place of o, the answer of another matrix of a stack, the sign of what is not sent, a clip's 0.2 left out."""
    for one, other in zip(stepped(kind, which, False), stepped(kind, which, True)):
        assert differences(one, other) == []


@pytest.mark.parametrize("kind", ["normuon", "adamuon", "kaon"])
def test_lanes_equal_the_reference(gpu, kind):  # noqa: F811
    """The GPU's passes on an emulated team. Kills: a preview that is left out of what is sent, strips of a stack whose
    answers lie elsewhere, a row's factor that stays the one of the row before."""
    for one, other in zip(stepped(kind, 0, False), stepped(kind, 0, True)):
        check(one, other)
    assert gpu and all(one.driver.launches for one in gpu.values())


def test_a_step_that_is_not_taken(gpu, monkeypatch):  # noqa: F811
    """By a flag that lies on the device. Kills: a moment of the rows that moves although nothing else does."""
    taken, passes = torch.tensor(True), native.Native.passes
    monkeypatch.setattr(native.Native, "passes", lambda self, *given: passes(self, *given[:3], taken))
    p = nn.Parameter(torch.randn(70, 130).bfloat16())
    opt = ShardedOptimizer([p], recipe("normuon"), weight_decay=0.1, fused=True)
    for step in range(4):
        p.grad = torch.randn(70, 130).bfloat16()
        before = [x.clone() for x in (p.detach(), *opt.state[p].values())]
        taken.fill_(step != 2)
        opt.step()
        same = [torch.equal(x, y) for x, y in zip(before, (p.detach(), *opt.state[p].values()))]
        assert step == 0 or same == [step == 2] * len(same)
    assert gpu


@pytest.mark.parametrize("kind, arch", list(zip(KINDS, ("sm_80", "sm_90", "sm_100", "sm_90"), strict=True)))
def test_compiles_without_spills(kind, arch):
    """Kills: rows' factors in an array that is indexed by a variable."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    key = key_at(recipe(kind), (4096, 4096), torch.bfloat16, torch.bfloat16)
    cuda.compiled(key, arch)
    for name, report in cuda.entry_of(key, arch).facts()["kernels"].items():
        assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), (name, report)
        assert report["registers"] <= 128, (name, report)
