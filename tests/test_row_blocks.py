"""Means over blocks of rows, against one mask a block."""

import pytest
import torch

from shardopt.dtensor.row_blocks import block_sums, told_to_rows

WHOLE = torch.arange(60.0, dtype=torch.float64).square() * torch.tensor([[1.0], [-0.5]])  # (2, rows)


@pytest.mark.parametrize("sizes", [(4,) * 15, (20, 4, 4, 3, 29), (60,), (1, 1, 58), (7, 7, 7, 39)])
@pytest.mark.parametrize(
    "ranks",
    [
        [((0, 60),)],
        [((0, 15),), ((15, 9),), ((24, 36),), ((0, 0),)],
        [((0, 7), (30, 11)), ((7, 23), (41, 19))],  # as a strided shard holds them
        [((22, 2), (25, 1), (50, 10)), ((0, 22), (24, 1), (26, 24))],
    ],
)
def test_sums_add_up_and_are_told_to_the_right_rows(sizes, ranks):
    """Kills: rows of a second run taken for those of the first, the first of equal blocks for a later one, a block cut
    at both ends, a shard without rows."""
    held = [torch.tensor([row for first, n in runs for row in range(first, first + n)], dtype=int) for runs in ranks]
    sums = sum(block_sums(WHOLE[:, rows], runs, sizes) for rows, runs in zip(held, ranks))
    expected = torch.stack([block.mean(-1) for block in WHOLE.split(sizes, -1)], -1) / 3
    block_of = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    for rows, runs in zip(held, ranks):
        assert torch.allclose(told_to_rows(sums, 3, runs, sizes), expected[:, block_of[rows]], rtol=1e-14, atol=0)
