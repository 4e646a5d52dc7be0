"""Every codec against a loop in float64, against itself, and cut in every way against uncut."""

import math
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.asks import Max, Mean, as_tuple, is_group
from shardopt.codecs import CODECS, check_slot, codec
from shardopt.codecs.block import Int8, Root4
from shardopt.codecs.blocks import Blocks
from shardopt.codecs.dynamic import entries
from shardopt.codecs.geometry import Geometry, view_shape
from shardopt.codecs.packed import pack, unpack
from shardopt.codecs.rounding import GRIDS, round_nearest, round_stochastic, uniform

SEED = 20240607
BLOCKED = [name for name in CODECS if name not in ("fp32", "bf16", "fp16", "factored")]
PACKED = ("int4", "dyn4", "log4")
ELEMENTWISE = [name for name in CODECS if name != "factored"]
SLOTS = [(name, True) for name in ELEMENTWISE if CODECS[name].signed]
SLOTS += [(name, False) for name in ELEMENTWISE if CODECS[name].non_negative]
NON_NEGATIVE = [name for name, signed in SLOTS if not signed]


def make(name, signed, block=None, rounding=None):
    """The codec as a slot of this kind gets it."""
    options = {}
    if block and name in BLOCKED:
        options["block"] = block
    if rounding and "rounding" in CODECS[name].__dataclass_fields__:
        options["rounding"] = rounding
    return CODECS[name](**options).for_slot(signed)


def random_noise(shape, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def values(shape, signed, seed=SEED, octaves=6.0, scale=1e-4):
    """Normal numbers times a log-normal spread, or their squares; a few exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(octaves / 4 * torch.randn(shape, generator=generator))
    x = torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x * scale)
    return x if signed else x * x


def drive(generator):
    """Result of a generator that asks nothing."""
    with pytest.raises(StopIteration) as stop:
        generator.send(None)
    return stop.value.value


def drive_together(generators, geos, where):
    """Results of the generators of virtual ranks at `where` = (row piece, column piece), answered as one parameter."""
    replies, results = [None] * len(generators), []
    while True:
        asked = []
        for generator, reply in zip(generators, replies):
            try:
                asked.append(generator.send(reply))
            except StopIteration as stop:
                results.append(stop.value)
        if not asked:
            return results
        assert len(asked) == len(generators), "every rank must ask as often as every other"
        columns = [answers(list(same), geos[0].view, where) for same in zip(*(as_tuple(a) for a in asked))]
        replies = [group if is_group(asked[0]) else group[0] for group in zip(*columns)]


def answers(asks, view, where):
    """What every rank hears: means in float64, maxima as they are."""
    assert len({type(ask) for ask in asks}) == 1
    over = asks[0].over if asks[0].over is not None else asks[0].dim
    over = {over} if isinstance(over, int) else set(over)
    groups = defaultdict(list)
    for rank, (i, j) in enumerate(where):
        groups[None if -2 in over else i, None if -1 in over else j].append(rank)
    heard = [None] * len(asks)
    for ranks in groups.values():
        if isinstance(asks[0], Max):
            total = torch.stack([asks[r].x for r in ranks]).amax(0)
        else:
            assert isinstance(asks[0], Mean)
            total = sum(asks[r].x.double().sum(asks[r].dim) for r in ranks)
            total = total / math.prod(view[dim] for dim in over)
            total = total if total.ndim == 0 else total.float()
        for r in ranks:
            heard[r] = total.clone()
    return heard


def whole(x, c, noise=None):
    """Parts of an uncut x."""
    return drive(c.encode(x, Geometry.whole(x.shape), lambda: random_noise(x.shape) if noise is None else noise))


def decoded(parts, c, shape):
    return c.decode(parts, Geometry.whole(shape))


def bits(x):
    """A tensor that compares bitwise."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for suffix in a:
        assert a[suffix].dtype == b[suffix].dtype
        assert torch.equal(bits(a[suffix]), bits(b[suffix])), suffix


# Geometry


def test_views():
    assert view_shape(()) == (1,)
    assert view_shape((7,)) == (7,)
    assert view_shape((7, 15)) == (7, 15)
    assert view_shape((1, 1)) == (1, 1)
    assert view_shape((8, 3, 3, 3)) == (8, 27)
    assert view_shape((8, 16, 3)) == (8, 48)
    assert view_shape((4, 16, 64)) == (4, 16, 64)
    assert view_shape((2, 4, 32, 64)) == (2, 4, 32, 64)
    assert view_shape((0, 5)) == (0, 5)


def test_geometry():
    geo = Geometry((4, 40), (((1, 2),), ((0, 8), (16, 8))), ((1, 3), (8, 16, 24)))
    assert geo.local == (2, 16)
    assert not geo.straddles(8)
    assert geo.straddles(16)
    assert not Geometry.whole((4, 40)).straddles(16)


# Blocks


@pytest.mark.parametrize("runs", [((0, 70),), ((16, 32),), ((0, 16), (48, 22)), ((0, 0),), ((32, 0),)])
def test_blocks_are_local_where_none_straddles(runs):
    geo = Geometry((3, 70), (((0, 3),), runs), ((), (16, 32, 48)))
    blocks = Blocks(geo, 16)
    columns = [j for first, length in runs for j in range(first, first + length)]
    x = torch.randn(3, len(columns))
    held = sorted({j // 16 for j in columns})
    assert not blocks.straddles and blocks.count == len(held)
    expected = [x[:, [k for k, j in enumerate(columns) if j // 16 == b]].amax(-1) for b in held]
    reduced = blocks.reduce(x, "amax")
    assert torch.equal(reduced, torch.stack(expected, -1) if held else x.new_empty(3, 0))
    assert torch.equal(blocks.spread(reduced), reduced[:, [held.index(j // 16) for j in columns]])


def test_blocks_that_straddle_are_held_by_all():
    geo = Geometry((2, 70), (((0, 2),), ((5, 3), (30, 20))), ((), (5, 8, 30, 50)))
    blocks = Blocks(geo, 16)
    x = torch.randn(2, 23)
    least = blocks.reduce(x, "amin")
    assert blocks.straddles and least.shape == (2, 5)
    assert torch.equal(least[:, 0], x[:, :3].amin(-1))
    assert torch.equal(least[:, 1], x[:, 3:5].amin(-1))
    assert torch.equal(least[:, 2], x[:, 5:21].amin(-1))
    assert least[:, 4].isinf().all()
    assert torch.equal(blocks.spread(least)[:, 21:], least[:, 3:4].expand(2, 2))
    assert Blocks(Geometry((0, 70), (((0, 0),), ((0, 70),)), ((), ())), 16).reduce(
        x.new_empty(0, 70), "amax"
    ).shape == (0, 5)


# Rounding


@pytest.mark.parametrize("dtype", GRIDS)
def test_stochastic_rounding(dtype):
    grid = GRIDS[dtype]
    fraction = torch.rand(64, generator=torch.Generator().manual_seed(1)).double()
    low = torch.tensor([1.25, -3.5, grid.least, 2.0**-5]).to(dtype).double()
    ulp = torch.tensor(
        [2.0**-g for g in (grid.fraction, grid.fraction - 1)] + [grid.least, 2.0 ** -(5 + grid.fraction)]
    )
    x = (low.abs()[:, None] + ulp[:, None] * fraction) * low.sign()[:, None]
    many = x.float().expand(3000, 4, 64).contiguous()
    y = round_stochastic(many, dtype, random_noise(many.shape)).double()
    steps = (y - x).abs() / ulp[:, None]
    assert steps.max() < 1
    assert ((y - x).mean(0) / ulp[:, None]).abs().max() < 5 * 0.5 / 3000**0.5
    exact = round_stochastic(y.float(), dtype, random_noise(y.shape, 3)).double()
    assert torch.equal(exact, y)


@pytest.mark.parametrize("dtype", GRIDS)
def test_rounding_of_extremes(dtype):
    largest, most = GRIDS[dtype].largest, torch.finfo(torch.float32).max
    x = torch.tensor([most, -most, largest, 0.0, -0.0, 1e-45, torch.nan]).repeat(500, 1)
    for y in (round_nearest(x, dtype), round_stochastic(x, dtype, random_noise(x.shape))):
        y = y.float()
        assert (y[:, 0] == largest).all() and (y[:, 1] == -largest).all() and (y[:, 2] == largest).all()
        assert (y[:, 3:5] == 0).all() and (y[:, 4].signbit()).all() and (y[:, 5] <= GRIDS[dtype].least).all()
        assert y[:, 6].isnan().all()
    if dtype != torch.float8_e4m3fn:  # which has no infinity
        x = torch.tensor([torch.inf, -torch.inf])
        assert torch.equal(round_nearest(x, dtype).float(), x)
        assert torch.equal(round_stochastic(x, dtype, random_noise((2,))).float(), x)


def test_uniform_is_in_the_half_open_interval():
    u = uniform(torch.tensor([0, -1, 2**31 - 1, -(2**31)], dtype=torch.int32))
    assert u.tolist() == [0.0, 1 - 2.0**-24, 0.5 - 2.0**-24, 0.5]


# Formats


def reference(name, x, signed, B):
    """decode(encode(x)) of one row, nearest rounding, Python floats."""
    out = []
    for start in range(0, len(x), B):
        out += reference_block(name, x[start : start + B], signed)
    return out


def reference_block(name, x, signed):
    a = max(map(abs, x))
    if a == 0:
        return [0.0] * len(x)
    sign = [math.copysign(1, v) for v in x]
    if name in ("int8", "int4"):
        n = {"int8": 127, "int4": 7}[name]
        return [round(v / a * n) * a / n for v in x]
    if name == "sqrt8":
        return [s * a * (round(127 * math.sqrt(abs(v) / a)) / 127) ** 2 for s, v in zip(sign, x)]
    if name == "root4":
        return [a * (max(1, round(255 * (v / a) ** 0.25)) / 255) ** 4 if v else 0.0 for v in x]
    if name in ("dyn8", "dyn4"):
        table = entries({"dyn8": 8, "dyn4": 4}[name], signed)
        allowed = table if signed else table[1:]
        return [a * min(allowed, key=lambda e: abs(e - v / a)) if v or signed else 0.0 for v in x]
    if name == "fp8":
        return [s * a / 448 * e4m3(abs(v) * 448 / a, signed or v == 0) for s, v in zip(sign, x)]
    levels = {"log8": 255, "log16": 65535, "log4": 15}[name]
    hi = math.log2(a)
    lo = min(max(math.log2(min(v for v in x if v > 0)), -126), hi - 1)
    step = (hi - lo) / (levels - 1)
    return [2 ** (lo + max(0, round((math.log2(v) - lo) / step)) * step) if v else 0.0 for v in x]


def e4m3(t, may_vanish):
    if t == 0:
        return 0.0
    ulp = 2.0 ** (max(math.floor(math.log2(t)), -6) - 3)
    return max(round(t / ulp) * ulp, 0 if may_vanish else 2.0**-9)


@pytest.mark.parametrize("name, signed", [slot for slot in SLOTS if slot[0] in BLOCKED])
@pytest.mark.parametrize("shape", [(3, 33), (2, 17), (4, 7), (1, 1), (3, 64)])
def test_against_a_loop(name, signed, shape):
    c = make(name, signed, block=16, rounding="nearest")
    x = values(shape, signed)
    x[0, :16] = 0
    parts = whole(x, c)
    geo = Geometry.whole(shape)
    for part in c.parts(geo.view):
        assert parts[part.suffix].shape == part.shape(shape, geo.view) and parts[part.suffix].dtype == part.dtype
    y = decoded(parts, c, shape)
    assert y.dtype == torch.float32 and y.shape == shape
    expected = torch.tensor([reference(name, row, signed, 16) for row in x.tolist()])
    # the lo of a log codec is rounded to float32 and the codes inherit that; a tie may fall either way
    off = (y - expected).abs() > 1e-5 * expected.abs()
    assert off.sum() <= 0.01 * off.numel(), (y[off], expected[off])


def test_tables():
    signed, unsigned = entries(8, True), entries(8, False)
    assert len(signed) == 255 and signed[127] == 0 and signed[-1] == 1 and signed == [-e for e in reversed(signed)]
    assert len(unsigned) == 256 and unsigned[0] == 0 and unsigned[1] == pytest.approx(3.25e-7) and unsigned[-1] == 1
    assert entries(4, True)[8:] == pytest.approx([0.0055, 0.0325, 0.0775, 0.2125, 0.4375, 0.6625, 1])
    assert signed == sorted(signed) and unsigned == sorted(unsigned)


def test_packing():
    codes = torch.arange(15, dtype=torch.uint8).reshape(3, 5)
    packed = pack(codes, 8)
    assert packed.shape == (3, 3)
    assert packed[0].tolist() == [0x10, 0x32, 0x84]
    assert torch.equal(unpack(packed, 5), codes)


@pytest.mark.parametrize("name, signed", SLOTS)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_zero_and_new_state(name, signed, rounding):
    c = make(name, signed, block=16, rounding=rounding)
    shape = (3, 35)
    parts = whole(torch.zeros(shape), c)
    assert (bits(decoded(parts, c, shape)) == 0).all()
    view = view_shape(shape)
    fresh = {p.suffix: torch.full(p.shape(shape, view), p.fill, dtype=p.dtype) for p in c.parts(view)}
    assert_same(fresh, parts)
    x = values(shape, signed)
    x[1] = 0
    assert (decoded(whole(x, c), c, shape)[x == 0] == 0).all()


@pytest.mark.parametrize("name", NON_NEGATIVE)
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-36, 2.0**-149])
def test_positive_is_never_zero(name, rounding, scale):
    c = make(name, False, block=64, rounding=rounding)
    x = (torch.exp2(-30 * torch.rand(4, 256, generator=torch.Generator().manual_seed(2))) * scale).clamp_min(2.0**-149)
    x[:, ::7] = 0
    y = decoded(whole(x, c), c, x.shape)
    assert torch.equal(y > 0, x > 0)
    assert y.isfinite().all()


@pytest.mark.parametrize("name, signed", SLOTS)
@pytest.mark.parametrize("scale", [1e-18, 1e-4, 1.0, 1e4])
def test_idempotent(name, signed, scale):
    shape = (4, 97)
    x = values(shape, signed, octaves=10, scale=scale if signed else scale**0.5)
    x[0] = x[0, :1].abs() + 1e-3 * scale  # constant blocks
    x[1] = x[1].abs().clamp(scale, 1.3 * scale)
    nearest = make(name, signed, block=32, rounding="nearest")
    parts = whole(x, nearest)
    y = decoded(parts, nearest, shape)
    for c in (nearest, make(name, signed, block=32, rounding="stochastic")):
        again = parts
        for cycle in range(100 if scale == 1e-4 and c == nearest else 2):
            again = whole(decoded(again, c, shape), c, random_noise(shape, cycle))
        assert_same(again, parts)
        assert decoded(again, c, shape).norm() == y.norm()


def test_a_table_without_minus_one_would_shrink():
    """The mirrored table is what keeps a block whose extreme is negative."""
    c = make("dyn8", True, block=16)
    x = torch.linspace(-1, 0.5, 16).reshape(1, 16)
    y = decoded(whole(x, c), c, x.shape)
    assert y.min() == -1
    table = torch.tensor([e for e in entries(8, True) if e > -1])
    z = x
    for _ in range(100):
        a = z.abs().max()
        z = table[(z / a - table[:, None]).abs().argmin(0)] * a
    assert z.norm() < 0.9 * x.norm()


@pytest.mark.parametrize("name, signed", SLOTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_non_finite_stays_visible_and_in_its_block(name, signed, bad):
    c = make(name, signed, block=16)
    x = values((3, 40), signed)
    spoilt = x.clone()
    spoilt[1, 18] = bad
    clean, y = decoded(whole(x, c), c, x.shape), decoded(whole(spoilt, c), c, x.shape)
    assert not y[1, 18].isfinite()
    outside = torch.ones_like(x, dtype=torch.bool)
    outside[1, 16:32] = False
    assert torch.equal(y[outside], clean[outside])


@pytest.mark.parametrize("name", ["root4", "log8", "log16", "log4"])
def test_stochastic_codes_have_the_right_mean(name):
    c = make(name, False, block=64, rounding="stochastic")
    x = values((1, 64), False, octaves=4).clamp_min(1e-12).double()
    n = 3000
    parts = whole(x.float().expand(n, 64).contiguous(), c)
    if name == "root4":
        t = 255 * (x / x.max()) ** 0.25
        q = parts[name].double()
    else:
        lo, span = (parts[f"{name}_{what}"][0].double() for what in ("lo", "range"))
        t = 1 + (x.log2() - lo) / span * (c.levels - 1)
        q = c.load(parts[name], Geometry.whole((n, 64))).double()
    t = t.clamp_min(1)
    assert (q - t).abs().max() < 1.01
    assert (q.mean(0) - t).abs().max() < 5 * 0.5 / n**0.5


def test_stochastic_fp8_is_unbiased():
    c = make("fp8", False, block=64)
    x = values((1, 64), False, octaves=2).clamp_min(1e-9)
    y = decoded(whole(x.expand(3000, 64).contiguous(), c), c, (3000, 64))
    assert ((y.double().mean(0) - x) / (x / 8 + x.max() * 2.0**-18)).abs().max() < 5 * 0.5 / 3000**0.5


def follow(c, steps=5000, shape=(2, 256), decay=0.999):
    """Median sqrt(stored / exact) of the elements whose gradients dropped 30-fold; the others keep theirs."""
    generator = torch.Generator().manual_seed(SEED)
    size = torch.exp2(1.5 * torch.randn(shape, generator=generator)) * 1e-3
    dropped = torch.rand(shape, generator=generator) < 0.5
    exact = size**2
    geo = Geometry.whole(shape)
    parts = whole(exact, c)
    size = torch.where(dropped, size / 30, size)
    g2 = (torch.randn((250, *shape), generator=generator) * size).square() * (1 - decay)
    g2 *= size.square() * (1 - decay) / g2.mean(0)
    draws = random_noise((steps, *shape)) if c.noisy else None
    for step in range(steps):
        x = g2[step % 250]
        exact = exact * decay + x
        _, new = drive_recur(c, parts, decay, x, geo)
        parts = drive(c.encode(new, geo, lambda step=step: draws[step]))
    return (c.decode(parts, geo) / exact)[dropped].sqrt().median().item()


def drive_recur(c, parts, decay, x, geo):
    generator = c.recur(parts, decay, x, geo)
    try:
        generator.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("an elementwise codec asks nothing to recur")


@pytest.mark.parametrize(
    "name, tolerance", [("log8", 0.1), ("root4", 0.1), ("bf16", 0.1), ("log4", 0.5), ("log16", 0.1)]
)
def test_follows_falling_gradients(name, tolerance):
    assert follow(make(name, False)) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("name, rounding", [("bf16", "nearest"), ("dyn8", None), ("log8", "nearest")])
def test_nearest_rounding_is_stale(name, rounding):
    assert follow(make(name, False, rounding=rounding)) > 3


# Cuts


def cut_geometries(view, row_cuts, columns, column_cuts):
    """Virtual ranks: row pieces between the cuts, times lists of column runs."""
    bounds = [0, *row_cuts, view[0]]
    rows = [((a, b - a),) for a, b in pairwise(bounds)]
    inner = tuple(sorted(set(row_cuts) - {0, view[0]})), tuple(sorted(set(column_cuts) - {0, view[1]}))
    geos = [Geometry(view, (r, c), inner) for r in rows for c in columns]
    return geos, [(i, j) for i in range(len(rows)) for j in range(len(columns))]


def split(view, row_cuts, column_cuts):
    bounds = [0, *column_cuts, view[1]]
    return cut_geometries(view, row_cuts, [((a, b - a),) for a, b in pairwise(bounds)], column_cuts)


def index_of(runs):
    return torch.tensor([k for first, length in runs for k in range(first, first + length)], dtype=torch.long)


def check_cut(c, x, geos, where):
    """Codes and decoded values of all pieces are bitwise those of the uncut tensor; scales too."""
    noise = random_noise(x.shape)
    expected = whole(x, c, noise)
    y = decoded(expected, c, x.shape)
    indices = [(index_of(g.runs[0])[:, None], index_of(g.runs[1])) for g in geos]
    generators = [c.encode(x[ix].contiguous(), g, lambda ix=ix: noise[ix].contiguous()) for g, ix in zip(geos, indices)]
    straddling = hasattr(c, "block") and geos[0].straddles(c.block)
    results = drive_together(generators, geos, where) if straddling else [drive(g) for g in generators]
    for parts, geo, ix in zip(results, geos, indices):
        assert torch.equal(bits(c.decode(parts, geo)), bits(y[ix]))
        for part in c.parts(geo.view):
            mine, theirs = parts[part.suffix], expected[part.suffix]
            if part.dims is None:
                theirs = bits(theirs)[ix]
            elif part.dims[-1][1] == 2:
                mine, theirs = unpack(mine, geo.local[1]), unpack(theirs, geo.view[1])[ix]
            elif straddling:
                theirs = theirs[index_of(geo.runs[0])]
            else:
                theirs = theirs[ix[0], (ix[1] // c.block).unique()]
            assert torch.equal(bits(mine), bits(theirs)), part.suffix


@pytest.mark.parametrize("name, signed", SLOTS)
def test_cut_equals_uncut(name, signed):
    view = (5, 70)
    c = make(name, signed, block=16)
    x = values(view, signed)
    x[3] = 0
    for row in range(6):
        check_cut(c, x, *split(view, (row,), ()))
    for columns in [(16,), (32, 64), (64,), (6,), (10, 34), (2, 4, 6), (0, 48), (70,), (40, 70)]:
        check_cut(c, x, *split(view, (), columns))
    check_cut(c, x, *split(view, (0, 2), (32, 48)))
    check_cut(c, x, *split(view, (2, 5), (20,)))
    if name not in PACKED:
        for column in (1, 33, 69):
            check_cut(c, x, *split(view, (), (column,)))
    strided = [((0, 16), (32, 16)), ((16, 16), (48, 22))]
    check_cut(c, x, *cut_geometries(view, (2,), strided, (16, 32, 48)))
    strided = [((0, 18), (36, 18)), ((18, 18), (54, 16))]
    check_cut(c, x, *cut_geometries(view, (), strided, (18, 36, 54)))


def test_a_stack_of_matrices_is_encoded_matrix_by_matrix():
    x = values((3, 4, 40), True)
    for name in ("int8", "int4", "dyn8"):
        c = make(name, True, block=16)
        parts = whole(x, c)
        assert parts[f"{name}_scale"].shape == (3, 4, 3)
        y = decoded(parts, c, x.shape)
        for i in range(3):
            assert torch.equal(y[i], decoded(whole(x[i], c), c, (4, 40)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    slot=st.sampled_from(SLOTS),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 40)),
    cut=st.tuples(st.integers(0, 4), st.integers(0, 20)),
    block=st.sampled_from([8, 16]),
    seed=st.integers(0, 99),
)
def test_any_shape_any_cut(slot, shape, cut, block, seed):
    c = make(*slot, block=block)
    x = values(shape, slot[1], seed=seed)
    check_cut(c, x, *split(shape, (min(cut[0], shape[0]),), (min(2 * cut[1], shape[1]),)))
    nearest = make(*slot, block=block, rounding="nearest")
    parts = whole(x, nearest)
    assert_same(whole(decoded(parts, nearest, shape), nearest), parts)


# Factored


@pytest.mark.parametrize("rows, cols", [((), ()), ((2,), ()), ((0, 3), (4,)), ((), (1, 9)), ((5,), (0,))])
def test_factored_recurrence(rows, cols):
    view, c = (5, 9), codec("factored").for_slot(False)
    geos, where = split(view, rows, cols)
    x = [values(view, False, seed) + 1e-30 for seed in (1, 2)]
    x[0][1] = x[1][1] = 0
    row, col = torch.zeros(5).double(), torch.zeros(9).double()
    index = [(index_of(g.runs[0])[:, None], index_of(g.runs[1])) for g in geos]
    parts = [{"row": torch.zeros(g.local[0]), "col": torch.zeros(g.local[1])} for g in geos]
    for t in range(2):
        row, col = row * 0.9 + x[t].double().mean(1), col * 0.9 + x[t].double().mean(0)
        expected = (row[:, None] * col / row.mean()).float()
        steps = drive_together([c.recur(p, 0.9, x[t][i], g) for p, g, i in zip(parts, geos, index)], geos, where)
        for (value, _), i in zip(steps, index):
            assert value.dtype == torch.float32
            torch.testing.assert_close(value, expected[i], rtol=1e-5, atol=0)
        parts = [drive(c.encode(new, g, None)) for (_, new), g in zip(steps, geos)]
    for value, i in zip(drive_together([c.read(p, g) for p, g in zip(parts, geos)], geos, where), index):
        torch.testing.assert_close(value, expected[i], rtol=1e-5, atol=0)
        assert (value[(i[0] == 1).squeeze(1)] == 0).all()


def test_factored_encodes_any_tensor_and_keeps_it():
    for shape in [(4, 6), (3, 2, 32)]:
        c, geo = codec("factored"), Geometry.whole(shape)
        x = values(shape, False)
        (parts,) = drive_together([c.encode(x, geo, None)], [geo], [(0, 0)])
        assert [tuple(parts[p.suffix].shape) for p in c.parts(shape)] == [shape[:-1], (*shape[:-2], shape[-1])]
        y = c.decode(parts, geo)
        torch.testing.assert_close(y.sum((-2, -1)), x.sum((-2, -1)))
        (again,) = drive_together([c.encode(y, geo, None)], [geo], [(0, 0)])
        torch.testing.assert_close(again, parts)
        zero = drive_together([c.recur({k: v * 0 for k, v in parts.items()}, 0.9, x * 0, geo)], [geo], [(0, 0)])[0][0]
        assert (zero == 0).all()


def test_factored_is_read_whole_only_where_it_is_whole():
    geos, _ = split((4, 6), (2,), ())
    with pytest.raises(AssertionError, match="read"):
        codec("factored").decode({"row": torch.ones(2), "col": torch.ones(6)}, geos[0])


# Names, options, errors


def test_names_and_parts():
    order = "fp32 bf16 fp16 int8 sqrt8 dyn8 root4 log8 log16 int4 dyn4 log4 fp8 factored"
    assert " ".join(CODECS) == order
    seen = {}
    for name, cls in CODECS.items():
        for part in cls().parts((64, 512)):
            assert part.suffix not in seen
            seen[part.suffix] = name
            assert part.reducible == part.suffix.endswith(("_scale", "_lo", "_range"))
    assert seen[""] == "fp32"


@pytest.mark.parametrize("name", CODECS)
def test_describe_is_parsed_back(name):
    cls = CODECS[name]
    for c in (cls(), cls().for_slot(cls.signed)):
        assert c.describe() == name and codec(name) == cls()
    if "block" in cls.__dataclass_fields__:
        c = cls(block=64)
        assert c.describe() == f"{name}(block=64)" and codec(c.describe()) == c and codec(c) is c
    if "rounding" in cls.__dataclass_fields__:
        c = cls(rounding="stochastic")
        assert codec(c.describe()) == c and codec(c.for_slot(False).describe()).for_slot(False) == c.for_slot(False)


def test_auto_rounding():
    noisy = {(name, signed) for name, signed in SLOTS if CODECS[name]().for_slot(signed).noisy}
    assert noisy == {(name, False) for name in ("bf16", "fp16", "root4", "log8", "log4", "fp8")}
    assert not replace(Root4(), rounding="nearest").noisy


def test_gate():
    assert codec("fp32").fits((3,)) and codec("factored").fits((2, 2)) and not codec("factored").fits((9,))
    for name in ELEMENTWISE[1:]:
        c = codec(name)
        assert c.fits((128, 32)) and not c.fits((8192,)) and not c.fits((64, 32)) and not c.fits((512, 31))


@pytest.mark.parametrize(
    "make_one, words",
    [
        (lambda: codec("int9"), "'int9'.*Use one of fp32, bf16"),
        (lambda: codec("int8(blok=3)"), "'blok'.*has the options block"),
        (lambda: codec("fp32(block=8)"), "has no options"),
        (lambda: codec("int8(_signed=True)"), "'_signed'"),
        (lambda: codec("int8(128)"), "name\\(option=value"),
        (lambda: codec("int8(block=__import__('os'))"), "name\\(option=value"),
        (lambda: codec("int8(**{})"), "name\\(option=value"),
        (lambda: codec(8), "got 8"),
        (lambda: Int8(block=100), "block=100.*power of two"),
        (lambda: codec("log4(block=2)"), "log4 got block=2"),
        (lambda: codec("int8(block=True)"), "block=True"),
        (lambda: codec("log8(rounding='up')"), "rounding='up'.*'nearest', 'stochastic' or 'auto'"),
        (
            lambda: check_slot(codec("log8"), "exp_avg", True, "AdamW"),
            "log8 stores non-negative slots; slot exp_avg of AdamW is signed. "
            "Use fp32, bf16, fp16, int8, sqrt8, dyn8, int4, dyn4 or fp8.",
        ),
        (lambda: check_slot(codec("int4"), "exp_avg_sq", False, "AdamW"), "stores signed slots.*log8.*or factored"),
    ],
)
def test_errors_say_what_to_do(make_one, words):
    with pytest.raises(ValueError, match=words):
        make_one()


def test_every_codec_takes_the_slots_it_says():
    for name, signed in SLOTS:
        check_slot(codec(name), "s", signed, "Rule")
