"""The GPU's kernels of what asks, without a GPU: emulated teams against the reference, NVRTC's report, the launches."""

from itertools import product
from math import prod

import numpy as np
import pytest
import torch

import shardopt
from shardopt import Recipe
from shardopt.codecs.geometry import Geometry
from shardopt.kernels import cpu, cuda, key_at, launcher, native, pass_launcher, spans
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.rounds import size_of
from tests import test_mesh
from tests.fake_gpu import emulated, gpu  # noqa: F401
from tests.kernel_kit import asking_cases, differences, stepped
from tests.table import DTYPES, recipe
from tests.test_kernel_passes import RECIPES, check, several

CASES = [
    (case, gradient)
    for case, gradient in asking_cases()
    if key_at(case.recipe(), case.shape, DTYPES[case.dtype], gradient).rounds
][:16]
# of one piece and of several, in rows and columns and in a stack; wider than a piece; a tail of every kind
SHAPES = ((270, 300), (70, 130), (2, 260, 40), (66, 9, 3, 3), (7, 15), (40,), (33000,), (), (0, 64), (3, 4300))


@pytest.mark.parametrize("case, gradient", CASES, ids=[f"{c.name()}-{str(g)[6:]}" for c, g in CASES])
def test_lanes_equal_the_reference(gpu, case, gradient):  # noqa: F811
    """Kills: an absent element that is counted, a shuffle that leaves lanes out, a row that is not ended, answers of
    another ask, extremes of a preview that another row's number went into."""
    check(stepped(case, gradient, False, 3), stepped(case, gradient, True, 3))
    assert gpu and all(one.driver.launches for one in gpu.values())


def launches(gpu):  # noqa: F811
    return sum(len(one.driver.launches) for one in gpu.values())


@pytest.mark.parametrize("name", RECIPES)
def test_many_shapes_in_one_call(gpu, name, monkeypatch):  # noqa: F811
    """However the launches are cut, the same bits. Kills: a warp's sums or columns lost or taken twice, the piece,
    span, group or answers of another launch, sums of pieces out of order, factors of another strip's columns."""
    rule, state, addons = RECIPES[name]
    given = rule(), state, addons, 2

    def run(fused):
        return several(fused, *given, shapes=SHAPES)[0]

    kernel, wide = run(True), launches(gpu)
    for one, other in zip(run(False), kernel):
        check(one, other)
    for module in (launcher, pass_launcher):
        monkeypatch.setattr(module, "ROOM", 64)
    for one, other in zip(kernel, run(True)):
        assert differences(one, other) == []
    assert launches(gpu) - wide > 1.5 * wide


@pytest.mark.parametrize("kind, name", [("tp rows, fsdp", "adamw all"), ("ep x fsdp", "adafactor")])
def test_on_a_mesh(gpu, kind, name):  # noqa: F811
    """Kills: sums that leave a run of a strided shard out, or a matrix of a stack; means of local rows alone."""
    test_mesh.test_equals_the_unsharded_step(kind, name)
    assert any(one.key.rounds and one.driver.launches for one in gpu.values())


def test_numbers_of_the_device_and_a_step_that_is_not_taken(gpu, monkeypatch):  # noqa: F811
    """Kills: a rate that is read when a launch is packed; rows, columns or counters that move although p does not."""
    rule, state, addons = RECIPES["adafactor"]
    taken = torch.tensor(True)
    passes = native.Native.passes
    monkeypatch.setattr(native.Native, "passes", lambda self, *given: passes(self, *given[:3], taken))
    monkeypatch.setattr(native.Native, "again", lambda *given: None)  # every step in full, where the flag comes in

    def run(lr, skips=()):
        torch.manual_seed(3)
        ps = [torch.nn.Parameter(torch.randn(shape)) for shape in ((70, 130), (4, 32, 48), (40,))]
        opt = shardopt.ShardedOptimizer(ps, Recipe(rule(), state, addons), lr=lr, fused=True)
        for step in range(3):
            taken.fill_(step not in skips)
            for p in ps:
                p.grad = torch.randn(p.shape)
            before = [{"p": p.detach().clone(), **{n: x.clone() for n, x in opt.state[p].items()}} for p in ps]
            opt.step()
            for p, old in zip(ps, before):
                now = {"p": p.detach(), **opt.state[p]}
                assert all(torch.equal(now[n], old[n]) for n in now) == (step in skips)
                assert all(not torch.equal(now[n], old[n]) for n in now) == (step not in skips)
        return [{"p": p.detach(), **opt.state[p]} for p in ps]

    def pointed():  # whether the passes so far were given pointers to numbers
        return {bool(x[4]) for one in gpu.values() for kernel, _, x in one.driver.launches if "pass" in kernel}

    plain = run(0.03125)
    assert pointed() == {False}
    for one, other in zip(plain, run(torch.tensor(0.03125))):
        assert differences(one, other) == []
    assert pointed() == {False, True}
    run(0.03125, skips=(1,))


def sums_of(rows, places, by_column):
    """Every sum that a pass leaves, by its place in the scratch memory: what it is of."""
    found = {}
    for place, (n_rows, n_cols) in zip(places.rows.tolist(), rows):
        line, column, high, _, across, rows0, cols0 = place[spans.LINE : spans.PIECE0]
        for beside, i in product(range(across), range(n_rows)):
            found[rows0 + beside * n_rows + i] = ("row", line + i)
        for down, j in product(range(-(-n_rows // high) if by_column else 0), range(n_cols)):
            found[cols0 + down * n_cols + j] = ("column", column + j)
    return found


@pytest.mark.parametrize("cut", [spans.CPU, spans.GPU], ids=["cpu", "gpu"])
@pytest.mark.parametrize("view", [(600, 5000), (3, 600, 900)])
def test_gathers_find_every_sum(cut, view):
    """Strided rows and columns at once. Kills: two sums in one place, terms of another run, of too few runs."""
    key = key_at(recipe("adafactor.update", "sqrt8+factored", "all"), view, torch.float32, torch.float32)
    runs = (*(((0, n),) for n in view[:-2]), ((0, 17), (300, 280)), ((0, 300), (512, 264)))
    geo = Geometry(view, runs, ((),) * len(view))
    shape = spans.shape_of(geo, key, [], 4, 4, cut)
    for by_column, places in shape.places.items():
        left = sums_of(shape.offsets[:, [spans.ROWS, spans.COLS]].tolist(), places, by_column)
        assert len(left) == places.sums
        for kind, gathers in (("row", places.lines), ("column", places.columns if by_column else [])):
            for begin, which, count, terms in gathers if places.sums else ():
                for k, i in product(range(terms), range(count)):
                    assert left.pop(begin + k * count + i) == (kind, which + i)
        assert not left
        firsts = np.cumsum([0, *places.matrices[:-1, 3]])
        assert (places.matrices[:, 0] == firsts).all() and places.matrices[:, 3].sum() == places.pieces


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (32000, 4096)])
def test_sums_are_small_beside_the_parameters(shape):
    """Kills: sums of columns for every row, of rows for every lane."""
    for addons, dtype in (("none", torch.bfloat16), ("all", torch.float32)):
        key = key_at(recipe("adafactor.update", "sqrt8+factored", addons), shape, dtype, dtype)
        (places,) = spans.shape_of(Geometry.whole(shape), key, [], 4, 4, spans.GPU).places.values()
        asked = sum(size_of(word, shape) for asked in key.rounds for word in asked)
        assert 8 * (places.sums + 3 * places.pieces) + (8 + 4) * asked < 0.04 * dtype.itemsize * prod(shape)


COMPILED = [
    ("sm_80", "adamw", "sqrt8+root4", "rms_clip", "stored"),
    ("sm_90", "adafactor.update", "sqrt8+factored", "none", "fresh"),
    ("sm_90", "lion", "int8+log8", "centralized", "fresh"),
    ("sm_100", "adafactor.raw", "sqrt8+factored", "orthograd", "fresh"),
]


@pytest.mark.parametrize("arch, rule, state, addons, source", COMPILED)
def test_compiles_without_spills(arch, rule, state, addons, source):
    """Kills: a register array that is indexed by a variable, the answers of an item read into an array."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    made = recipe(rule, state, addons, "stochastic", source)
    key = key_at(made, (4096, 4096), torch.bfloat16, torch.bfloat16)
    cuda.compiled(key, arch)
    kernels = cuda.entry_of(key, arch).facts()["kernels"]
    assert list(kernels) == list(key.kernels) and len(kernels) >= len(key.rounds) + 2
    for name, report in kernels.items():
        assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), (name, report)
        assert report["registers"] <= 128, (name, report)


def test_what_asks_has_a_kernel_on_a_gpu():
    """Kills: a recipe that is refused for a GPU because it asks."""
    p = torch.nn.Parameter(torch.ones(64, 128))
    opt = shardopt.Adafactor([p], fused=True)
    _, layout, codecs = opt.plan(opt.recipes[0], p)
    key = native.key_for(opt.recipes[0], codecs, layout, torch.device("cuda", 0), (p.dtype, p.dtype))
    assert list(key.kernels) == ["pass0", "pass1", "pass2", "gather", "settle"]
    assert cpu.load is not emulated and emulated(key).cut is spans.GPU
