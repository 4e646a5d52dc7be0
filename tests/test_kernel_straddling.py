"""Kernels where blocks lie on several ranks: what the reference computes there, bit by bit."""

import threading
from functools import partial
from math import prod

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import shardopt
from shardopt import Recipe, rules
from shardopt.kernels import cuda, native
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.key import key_of
from shardopt.kernels.replay import Replay
from shardopt.kernels.spans import apart
from tests import test_mesh
from tests.fake_gpu import gpu  # noqa: F401
from tests.kernel_kit import differences
from tests.test_kernel_passes import check
from tests.threaded import run_threaded

# cut evenly, unevenly, in strips
SHAPES = ((9, 1376), (3, 4, 1004), (33, 140), (12, 2748), (70, 64))
ODD = ((7, 2753), (70, 131), (300, 33))
STATES = {
    "int8": {"exp_avg": "int8", "exp_avg_sq": "root4"},
    "sizes": {"exp_avg": "sqrt8(block=64)", "exp_avg_sq": "log8"},
    "small": {"exp_avg": "fp8(block=8)", "exp_avg_sq": "fp8(block=32)"},
    "large": {"exp_avg": "dyn8(block=1024)", "exp_avg_sq": "log16(block=2048)"},
    "half": {"exp_avg": "int4", "exp_avg_sq": "log4"},
    "dyn4": {"exp_avg": "dyn4", "exp_avg_sq": "bf16"},
}
STATE = {"signed": "int8", "non_negative": "root4"}
CASES = [("3", s) for s in list(STATES)[:-2]] + [("2 x 2", "half"), ("2 x 2", "dyn4"), ("strips", "sizes")]
PLACES = {  # mesh and placements of columns
    "3": ((3,), (Shard(1),)),
    "2 x 2": ((2, 2), (Shard(0), Shard(1))),
    "strips": ((2, 2), (Shard(1), Shard(1))),
    "3 x 2": ((3, 2), (Shard(0), Shard(1))),
    "8": ((8,), (Shard(1),)),
}


def shapes_of(state):
    return SHAPES if state in ("half", "dyn4") else (*SHAPES, *ODD)  # bytes of two columns are whole


def run(place, make, spoil=None, steps=3, dtype=torch.bfloat16, shapes=SHAPES, device="cpu"):
    """What every rank has after some steps, and what was asked."""
    sizes, placements = PLACES[place]

    def body(_):
        mesh = init_device_mesh(device, sizes)
        model = test_mesh.build(shapes, dtype)
        last = tuple(Shard(p.dim + 1) if p.dim else p for p in placements)  # the last dim of a stack
        for i, p in enumerate(model):
            its = last if p.ndim == 3 else placements
            one = nn.ParameterList([p])
            test_mesh.by_hand(*its)(one, mesh)
            model[i] = one[0]
        opt = make(list(model))
        draw = torch.Generator().manual_seed(11)
        for step in range(steps):
            for i, p in enumerate(model):
                g = torch.randn(p.shape, generator=draw).to(dtype)
                if spoil is not None:
                    spoil(step, i, g)
                whole = test_mesh.distributed(g, g.shape, mesh, tuple(Replicate() for _ in sizes))
                p.grad = whole.redistribute(placements=p.placements)
            opt.step()
        assert opt.native is None or (opt.native.stepped, opt.native.left) == (len(model), 0)
        left = [
            {n: getattr(x, "_local_tensor", x).detach().cpu() for n, x in {"p": p, **opt.state[p]}.items()}
            for p in model
        ]
        return left, (opt.answers.rounds, opt.answers.collectives, opt.answers.bytes)

    return run_threaded(prod(sizes), body)


def compare(place, make, exact=True, **options):
    """exact: every bit, but for logarithms of float32 beside those of float64."""
    reference, kernel = (run(place, partial(make, fused=fused), **options) for fused in (False, True))
    for (mine, asked), (others, counts) in zip(kernel, reference):
        assert asked == counts and asked[1] > 0
        for one, other in zip(others, mine):
            check(one, other)
            if exact and not any("log" in name for name in one):
                assert differences(one, other) == []


def adamw(state):
    return partial(shardopt.AdamW, lr=0.01, state=STATES[state], rounding="stochastic")


@pytest.mark.parametrize("place, state", CASES)
def test_equals_the_reference(place, state):
    """Kills: a block that begins where the rank's piece does, the numbers of another rank's blocks, old numbers that
    are overwritten before all have read them, numbers of blocks with nothing local left as they were, noise by the
    place in the piece, two pieces of a block of which one's extreme is lost."""
    compare(place, adamw(state), shapes=shapes_of(state))


@pytest.mark.parametrize("place, state", [("3", "int8"), ("strips", "sizes"), ("3", "large"), ("2 x 2", "half")])
def test_lanes_equal_the_reference(gpu, place, state):  # noqa: F811
    """The same of the emulated GPU. Kills: a block that a lane alone decides, extremes of absent
    elements."""
    compare(place, adamw(state), shapes=shapes_of(state), steps=2)
    assert any(name == "shardopt_close" for one in gpu.values() for name, *_ in one.driver.launches)


def test_a_step_that_is_not_taken(gpu, monkeypatch):  # noqa: F811
    """Kills: numbers of blocks that change although nothing else does."""
    mine, passes = threading.local(), native.Native.passes  # a flag a rank
    monkeypatch.setattr(native.Native, "passes", lambda self, *given: passes(self, *given[:3], mine.flag))
    monkeypatch.setattr(native.Native, "again", lambda *given: None)  # every step in full, where the flag comes in

    def spoil(step, i, g):
        mine.flag = torch.tensor(step == 0)

    one, two = (run("3", partial(adamw("sizes"), fused=True), spoil, steps, shapes=SHAPES) for steps in (1, 2))
    for (left, _), (right, _) in zip(one, two):
        assert [differences(a, b) for a, b in zip(left, right)] == [[]] * len(SHAPES)


@pytest.mark.parametrize("kind", ["nan", "zero", "tiny"])
def test_gradients_that_spoil(kind):
    """Kills: a maximum that loses NaN, a block of zeros that is not, a smallest value where there is none."""

    def spoil(step, i, g):
        if kind == "nan" and step == 1:
            g.view(-1)[g.numel() // 2] = torch.nan
        elif kind == "zero":
            g[:, 100:] = 0
        elif kind == "tiny":
            g *= 1e-18

    for state in ("int8", "sizes"):
        compare("3", adamw(state), shapes=SHAPES, spoil=spoil, dtype=torch.float32)


RULES_THAT_ASK = {
    "muon": lambda ps, fused: shardopt.Muon(ps, lr=0.01, state="int8", fused=fused),
    "lion": lambda ps, fused: shardopt.Lion(
        ps, state="int8", addons=["cautious", "gradient_centralization"], rounding="kahan", fused=fused
    ),
    "adafactor": lambda ps, fused: shardopt.Adafactor(
        ps, beta1=0.9, state={"exp_avg": "int8", "exp_avg_sq": "factored"}, fused=fused
    ),
    "rmsprop": lambda ps, fused: shardopt.RMSprop(
        ps, momentum=0.5, centered=True, addons=["rms_clip"], state=STATE, fused=fused
    ),
}


@pytest.mark.parametrize("name", RULES_THAT_ASK)
def test_rules_that_ask_besides(name, taken):
    """Kills: answers of another ask, a round too many, a kernel whose last round is not the blocks'."""
    compare("2 x 2", RULES_THAT_ASK[name], exact=False, shapes=SHAPES)
    assert taken == [] if name == "muon" else all(taken) and len(taken) == 2 * 4


def test_the_short_way_is_the_same_way(taken, monkeypatch):
    """Sums and maxima in one standing round, beside ranks that run the reference. Kills: the extremes of the step
    before, an answer taken for its neighbour's, messages in another order than theirs."""

    def make(ps, fused):
        opt = RULES_THAT_ASK["rmsprop"](ps, fused)
        opt.native = None if dist.get_rank() % 2 else opt.native
        return opt

    found = [run("2 x 2", lambda ps: make(ps, True), shapes=SHAPES, steps=4)]
    assert taken == [True] * 6
    monkeypatch.setattr(Replay, "possible", False)
    found.append(run("2 x 2", lambda ps: make(ps, True), shapes=SHAPES, steps=4))
    for (mine, asked), (others, counts) in zip(*found):
        assert asked == counts
        assert [differences(a, b) for a, b in zip(mine, others)] == [[]] * len(SHAPES)


@pytest.mark.parametrize(
    "name, place, shape",
    [("adamw", "3 x 2", (2, 4099)), ("adamw", "8", (200, 33)), ("centred", "3 x 2", (2, 4096))],
)
def test_ranks_that_hold_nothing(name, place, shape, taken):
    """No row, or no column, of anything that is asked: they take part in every message. Kills: a repeated round that
    leaves them, or a kind of ask, out."""
    make = {
        "adamw": adamw("int8"),
        "centred": partial(shardopt.Lion, state="bf16", addons=["gradient_centralization", "cautious"]),
    }[name]
    compare(place, make, exact=name == "adamw", shapes=(shape,))
    assert all(taken) and taken


@pytest.mark.parametrize("sizes", [(256,), (64, 512), (8, 32, 256), (256, 1024)])
@pytest.mark.parametrize("column0, length", [(1376, 1376), (0, 5), (255, 2), (1, 4000), (512, 512), (700, 3)])
def test_runs_are_cut_where_blocks_begin(sizes, column0, length):
    """Every piece lies within one block of each size or begins where one does. Kills: a tile whose blocks are not those
    of the row."""
    pieces = apart([(10, column0, length)], sizes)
    assert [c for local, first, n in pieces for c in range(first, first + n)] == list(range(column0, column0 + length))
    for local, first, n in pieces:
        assert n > 0 and local - first == 10 - column0
        assert all(first % size == 0 or first // size == (first + n - 1) // size for size in sizes)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("state", ["int8", "half"])
def test_compiles_without_spills(arch, state):
    """Kills: answers that are copied into an array whose index the compiler does not know."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    recipe = Recipe(rules.AdamW(), STATES[state], ("cautious_decay",), rounding="stochastic")
    codecs = tuple(recipe.codecs((4096, 11008), torch.bfloat16).items())
    key = key_of(recipe, codecs, torch.bfloat16, torch.bfloat16, across=("exp_avg", "exp_avg_sq"))
    cuda.compiled(key, arch)
    kernels = cuda.entry_of(key, arch).facts()["kernels"]
    assert list(kernels) == ["pass0", "pass1", "gather", "close"]
    for name, report in kernels.items():
        assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), (name, report)
        assert report["registers"] <= 128, (name, report)
