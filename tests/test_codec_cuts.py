"""Every format cut in every way against uncut, bitwise; and the factored one."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.codecs import codec
from shardopt.codecs.geometry import Geometry
from shardopt.codecs.packed import unpack
from tests.codec_kit import (
    PACKED,
    SLOTS,
    assert_same,
    bits,
    decoded,
    drive,
    drive_together,
    make,
    random_noise,
    values,
    whole,
)

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
