"""Muon by kernels: momentum in one pass, the matrices orthogonalized in between, everything written in another."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from shardopt.codecs.geometry import Geometry
from shardopt.item import Item
from shardopt.kernels import cpu, cuda, key_at
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.passes import AskingCall
from shardopt.kernels.spans import parts_of, shape_of
from tests import test_muon_mesh
from tests.fake_gpu import gpu  # noqa: F401
from tests.kernel_kit import differences

SHAPES = ((70, 130), (64, 256), (4, 32, 48), (66, 9, 3, 3), (330, 64), (300, 1024), (0, 64), (128, 7))
CASES = {
    "int8": ({}, "int8", ("cautious_decay",), "nearest", torch.float32),
    "exact": ({"wire": "exact", "nesterov": False, "adjust_lr": "spectral"}, "int8", (), "nearest", torch.bfloat16),
    "sum": ({"accumulate": "sum", "wire": "int8+int4"}, "sqrt8", ("decay",), "kahan", torch.bfloat16),
    "fp32": ({"adjust_lr": "match_rms_adamw"}, "fp32", ("cautious", "decay"), "nearest", torch.float32),
    "asks before and after": ({}, "bf16", ("gradient_centralization", "rms_clip"), "stochastic", torch.bfloat16),
    "int4": ({}, "int4", ("l2", "grams"), "stochastic", torch.float16),
    "periodic": ({"mode": "periodic", "period": 2}, "int8", ("decay",), "nearest", torch.float32),
    "gram": ({"mode": "auto", "orthogonalizer": "gram"}, "int8", ("decay",), "nearest", torch.float32),
}


def stepped(name, fused, steps=3, **more):
    options, state, addons, rounding, dtype = CASES[name]
    torch.manual_seed(5)
    ps = [nn.Parameter((torch.randn(shape) * 0.1).to(dtype)) for shape in SHAPES]
    decay = {"weight_decay": 0.1} if any("decay" in addon or addon == "l2" for addon in addons) else {}
    opt = ShardedOptimizer(
        [{"params": ps[::2], "lr": 0.02, **decay}, {"params": ps[1::2], "lr": 0.03, **decay}],
        Recipe(rules.Muon(**options), state, addons, rounding=rounding, **more),
        fused=fused,
    )
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape).to(dtype)
        opt.step()
    if fused:
        assert (opt.native.stepped, opt.native.left) == (len(ps), 0)
    return [{"p": p.detach(), **opt.state[p]} for p in ps]


@pytest.mark.parametrize("more", ({}, {"update_from": "stored"}), ids=("fresh", "stored"))
@pytest.mark.parametrize("name", CASES)
def test_equals_the_reference(name, more):
    """Bit by bit, also where sums are asked besides: these shapes have none that differ. Kills: the answer of another
    row, matrix or parameter, the rate of another shape or of the decay, momentum that decays twice, a sum for EMA."""
    for one, other in zip(stepped(name, False, **more), stepped(name, True, **more)):
        assert differences(one, other) == []


@pytest.mark.parametrize("name", ["int8", "sum", "asks before and after"])
def test_lanes_equal_the_reference(gpu, name):  # noqa: F811
    """The GPU's passes on an emulated team. Kills: an element that a lane writes beyond its row, a row's place that is
    not moved on with the rows of a piece. Means are added up in another order, so that with them a bit may differ."""
    for one, other in zip(stepped(name, False), stepped(name, True)):
        assert name.startswith("asks") or differences(one, other) == []
        assert (one["p"].double() - other["p"].double()).norm() <= 1e-3 * one["p"].double().norm()
    assert gpu and all(one.driver.launches for one in gpu.values())


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
def test_compiles_for_gpus(arch):
    """Kills: registers that spill where the answer is read."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    key = key_at(Recipe(rules.Muon(), "int8", ("decay",)), (4096, 4096), torch.bfloat16, torch.bfloat16)
    cuda.compiled(key, arch)
    report = cuda.entry_of(key, arch).facts()["report"]
    assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), report


def test_a_rate_that_is_a_tensor():
    """Of which a product is rounded once. Kills: a rate and the factor of its shape multiplied in float32."""

    def run(fused):
        torch.manual_seed(1)
        ps = [nn.Parameter(torch.randn(rows, 7)) for rows in range(8, 60)]
        opt = shardopt.Muon(ps, lr=torch.tensor(0.02), fused=fused)
        for p in ps:
            p.grad = torch.randn(p.shape)
        opt.step()
        return [{"p": p.detach(), **opt.state[p]} for p in ps]

    assert [differences(*both) for both in zip(run(False), run(True))] == [[]] * 52


def test_split_matrices():
    """Whose blocks have rates of their own. Kills: a rate adjusted twice."""

    def run(fused):
        torch.manual_seed(1)
        p = nn.Parameter(torch.randn(96, 40))
        opt = shardopt.Muon([p], split=(64, 16, 16), lr=0.02, fused=fused)
        p.grad = torch.randn(96, 40)
        opt.step()
        return {"p": p.detach(), **opt.state[p]}

    assert differences(run(False), run(True)) == []


@pytest.mark.parametrize("name", ["muon int8", "muon int8+int4", "muon exact", "normuon", "adamuon", "blocks"])
@pytest.mark.parametrize("kind", ["fsdp 3", "hsdp 2x2", "tp rows, fsdp", "ep x fsdp"])
def test_ranks_with_and_without_a_compiler(kind, name, monkeypatch):
    """Every second rank runs the reference, and all together give the bits of one device, or, where sums are asked,
    what contracts allow. Kills: an x or an answer laid out otherwise than the reference's, a rank without elements that
    skips the exchange or a round, norms of local rows, a mean that is asked in another shape."""
    made, muon = [], test_muon_mesh.muon

    def mixed(*given):
        def make(ps):
            opt = muon(*given)(ps)
            if dist.is_initialized() and dist.get_rank() % 2:
                opt.native = None
            made.append(opt)
            return opt

        return make

    monkeypatch.setattr(test_muon_mesh, "muon", mixed)
    if name == "blocks":
        test_muon_mesh.test_norms_of_blocks_are_those_of_one_device(kind, rules.NorMuon)
    else:
        test_muon_mesh.test_equals_one_device(kind, name)
    assert sum(opt.native is not None and opt.native.asked > 0 for opt in made) > 1
    assert any(opt.native is None for opt in made)


def test_nothing_is_written_before_the_result_is_there(monkeypatch):
    """Kills: momentum written by the pass that works out what is sent."""
    p = nn.Parameter(torch.randn(64, 96))
    opt = shardopt.Muon([p], fused=True)
    p.grad = torch.randn(64, 96)
    opt.step()
    before = [x.clone() for x in (p.detach(), *opt.state[p].values())]

    def fail(*_):
        raise RuntimeError("a link went down")

    monkeypatch.setattr("shardopt.dtensor.whole.worked", fail)
    with pytest.raises(RuntimeError, match="link"):
        opt.step()
    assert all(torch.equal(x, y) for x, y in zip(before, (p.detach(), *opt.state[p].values())))


def test_two_runs_of_columns():
    """Of a shard that is cut by two axes: x and the answer lie as its elements do. Kills: rows as long as a run."""
    geo = Geometry((6, 700), (((0, 6),), ((0, 256), (512, 100))), ((), ()))
    recipe = Recipe(rules.Muon(lr=0.5), {"signed": "int8", "non_negative": "root4"})
    torch.manual_seed(0)
    p, g, o = (torch.randn(geo.local) for _ in range(3))
    state = {"step": torch.zeros(()), "momentum_buffer.int8": torch.zeros(geo.local, dtype=torch.int8)}
    state["momentum_buffer.int8_scale"] = torch.zeros(6, 2)
    layout = SimpleNamespace(geo=geo, local_shape=geo.local)
    codecs = recipe.codecs((6, 700), torch.float32)
    item = Item(p.clone(), g, layout, recipe, codecs, state, {"lr": 0.5, "momentum": 0.95})
    key = key_at(recipe, (6, 700), torch.float32, torch.float32)
    call = AskingCall(key, cpu.load(key))
    call.add(item, key, shape_of(geo, key, parts_of(codecs, layout), 4, 4), 0)
    call.close()
    step = call.stepping(np.array([g.data_ptr()]), {}, [g])
    (asked,) = next(step)[0]
    m = g * (1 - 0.95)
    assert asked.x.equal(m * 0.95 + g * (1 - 0.95))
    with pytest.raises(StopIteration):
        step.send({0: (o,)})
    assert item.p.equal(p - o * 0.5) and state["step"] == 1
