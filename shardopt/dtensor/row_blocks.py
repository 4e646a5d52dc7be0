"""Means over blocks of rows (heads, fused q, k, v), wherever the rows are: local sums, and which row is told which.

A local shard begins and ends anywhere in a block. Blocks of one size that follow one another are summed in one go, in
a fixed order, and a NaN stays in its block.
"""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardopt.codecs.geometry import Runs


class Stretch(NamedTuple):
    """Local rows here..here+rows-1, of blocks of one size: the first of them, and its rows that lie before."""

    here: int
    rows: int
    first: int
    size: int
    before: int

    @property
    def touched(self) -> int:
        """Blocks that have some of these rows."""
        return -(-(self.before + self.rows) // self.size)


def stretches(runs: Runs, sizes: Sequence[int]) -> Iterator[Stretch]:
    """The local rows in order, cut where the size of the blocks changes. runs: of global rows; sizes: of the blocks."""
    here = 0
    for begin, length in runs:
        start = block = 0
        for size, same in groupby(sizes):
            count = len(list(same))
            low, high = max(begin, start), min(begin + length, start + count * size)
            if low < high:
                skipped, before = divmod(low - start, size)
                yield Stretch(here + low - begin, high - low, block + skipped, size, before)
            start, block = start + count * size, block + count
        here += length


def block_sums(rows: Tensor, runs: Runs, sizes: Sequence[int]) -> Tensor:
    """(..., blocks) from one number a local row, (..., rows)."""
    sums = rows.new_zeros(*rows.shape[:-1], len(sizes))
    for part in stretches(runs, sizes):
        padding = part.before, part.touched * part.size - part.before - part.rows
        whole = F.pad(rows.narrow(-1, part.here, part.rows), padding).unflatten(-1, (part.touched, part.size))
        sums.narrow(-1, part.first, part.touched).add_(whole.sum(-1))
    return sums


def told_to_rows(sums: Tensor, cols: int, runs: Runs, sizes: Sequence[int]) -> Tensor:
    """(..., rows): every local row's block's mean over its GLOBAL elements, from (..., blocks)."""
    told = []
    for part in stretches(runs, sizes):
        means = sums.narrow(-1, part.first, part.touched) / max(1, part.size * cols)
        told.append(means.repeat_interleave(part.size, -1).narrow(-1, part.before, part.rows))
    return torch.cat(told, -1) if told else sums[..., :0]
