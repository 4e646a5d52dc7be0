"""How DTensor cuts one dim over mesh axes, as pure numbers: the pieces of any rank and all boundaries."""

from functools import lru_cache
from itertools import product
from typing import NamedTuple

from shardopt.codecs.geometry import Runs, taken


class Cut(NamedTuple):
    """One mesh axis that shards a dim. split: 1, or the split factor of a strided shard."""

    axis: int
    size: int
    split: int = 1


def chunk(runs: Runs, pieces: int, index: int) -> Runs:
    """The index-th of `pieces` chunks of these runs laid end to end, in the sizes of torch.chunk; may be empty."""
    total = sum(length for _, length in runs)
    step = -(-total // pieces) if total else 0
    begin, end = min(index * step, total), min((index + 1) * step, total)
    return taken(runs, begin, end)


def pieces_of(length: int, cuts: tuple[Cut, ...], where: dict[int, int]) -> Runs:
    """What the rank at mesh coordinates `where` holds of a dim, in local order; at least one run, perhaps empty.

    Axes cut from left to right. A strided axis first cuts into `split` pieces and takes its chunk of every one.
    """
    runs: Runs = ((0, length),)
    for cut in cuts:
        held: list[tuple[int, int]] = []
        for piece in range(cut.split):
            held.extend(chunk(chunk(runs, cut.split, piece), cut.size, where[cut.axis]))
        runs = tuple(held)
    return merge(runs) or ((0, 0),)


def merge(runs: Runs) -> Runs:
    """Runs that touch become one."""
    merged: list[tuple[int, int]] = []
    for first, length in runs:
        if merged and sum(merged[-1]) == first:
            merged[-1] = (merged[-1][0], merged[-1][1] + length)
        else:
            merged.append((first, length))
    return tuple(merged)


@lru_cache(maxsize=65536)
def boundaries(length: int, cuts: tuple[Cut, ...]) -> tuple[int, ...]:
    """Inner boundaries between the pieces of all ranks, ascending."""
    found: set[int] = set()
    for where in product(*(range(cut.size) for cut in cuts)):
        coordinates = {cut.axis: index for cut, index in zip(cuts, where)}
        for first, size in pieces_of(length, cuts, coordinates):
            if size:
                found.update((first, first + size))
    return tuple(sorted(found - {0, length}))
