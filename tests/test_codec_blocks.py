"""Views, blocks and rounding: what all formats are made of."""

import pytest
import torch

from shardopt.codecs.blocks import Blocks
from shardopt.codecs.geometry import Geometry, view_shape
from shardopt.codecs.rounding import GRIDS, round_nearest, round_stochastic, uniform
from tests.codec_kit import random_noise

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
