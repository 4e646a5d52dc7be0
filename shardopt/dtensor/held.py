"""What every rank of a team holds of a stack of matrices, from the layout alone; tensors cut and joined that way."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import product
from math import prod

import torch
from torch import Tensor

from shardopt.codecs.geometry import Runs
from shardopt.dtensor.cut import Cut, merge, pieces_of
from shardopt.dtensor.layout import Layout, cuts_of, view_dim


@dataclass(frozen=True)
class Held:
    """Of a stack (count, rows, cols), the leading dims of the view merged: which matrices, and what of each."""

    matrices: tuple[int, ...]
    rows: Runs
    cols: Runs

    @cached_property
    def members(self) -> frozenset[int]:
        """The matrices, to be looked up."""
        return frozenset(self.matrices)

    @property
    def empty(self) -> bool:
        return not (self.matrices and length(self.rows) and length(self.cols))


def holdings(layout: Layout) -> tuple[Held, ...]:
    """Of every position of the team along the axes that shard the parameter."""
    cuts = tuple(cuts_of(layout.mesh, layout.placements, dim) for dim in range(len(layout.shape)))
    sizes = tuple((axis, layout.mesh.size(axis)) for axis in layout.sharding)
    return held_by_all(layout.shape, layout.geo.view, cuts, sizes)


@lru_cache(maxsize=4096)
def held_by_all(
    shape: tuple[int, ...], view: tuple[int, ...], cuts: tuple[tuple[Cut, ...], ...], sizes: tuple[tuple[int, int], ...]
) -> tuple[Held, ...]:
    """sizes: (mesh axis, its size) of the axes that shard."""
    first = [next(d for d in range(len(shape)) if view_dim(shape, d) == dim) for dim in range(len(view))]
    everywhere = {cut.axis: 0 for cut in sum(cuts, ())}
    found = []
    for place in product(*(range(size) for _, size in sizes)):
        where = {**everywhere, **{axis: index for (axis, _), index in zip(sizes, place)}}
        runs = []
        for dim, d in enumerate(first):  # of merged dims only the first is ever cut
            inner = view[dim] // max(1, shape[d])
            runs.append(tuple((a * inner, n * inner) for a, n in pieces_of(shape[d], cuts[d], where)))
        leading = [[i for a, n in dim for i in range(a, a + n)] for dim in runs[:-2]]
        matrices = tuple(flat(index, view[:-2]) for index in product(*leading))
        found.append(Held(matrices, runs[-2], runs[-1]))
    return tuple(found)


def flat(index: Sequence[int], sizes: Sequence[int]) -> int:
    place = 0
    for i, size in zip(index, sizes):
        place = place * size + i
    return place


def count_of(view: Sequence[int]) -> int:
    """Matrices of a stack."""
    return prod(view[:-2])


def length(runs: Runs) -> int:
    return sum(n for _, n in runs)


def runs_of(indices: Sequence[int]) -> Runs:
    """Ascending indices as runs."""
    return merge(tuple((i, 1) for i in indices))


def select(x: Tensor, *runs: Runs) -> Tensor:
    """These runs of the first dims of x, end to end; a view where each is one."""
    for dim, pieces in enumerate(runs):
        parts = [x.narrow(dim, first, n) for first, n in pieces]
        x = parts[0] if len(parts) == 1 else torch.cat(parts, dim)
    return x


def place(into: Tensor, piece: Tensor, *runs: Runs) -> None:
    """The inverse of `select`: write the piece where it was cut."""
    for spots in product(*(spans(pieces) for pieces in runs)):
        target, source = into, piece
        for dim, (there, here, n) in enumerate(spots):
            target, source = target.narrow(dim, there, n), source.narrow(dim, here, n)
        target.copy_(source)


def spans(runs: Runs) -> Iterator[tuple[int, int, int]]:
    """(first in the whole, first in the piece, length)."""
    here = 0
    for first, n in runs:
        yield first, here, n
        here += n
