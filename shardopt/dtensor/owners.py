"""Which rank gets which work: longest first, and where that leaves ranks uneven, packed under a bisected limit.

Everything is counted in whole FLOPs and bytes and every tie is broken by position, so that all ranks find the same.
"""

import heapq
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

EVEN = 1.05  # the longest share over the shortest possible that counts as balanced


class Unit(NamedTuple):
    """Matrices of one shape that go to one owner together. holder: their shard position where they cannot move."""

    flops: int
    bytes: int
    matrices: tuple[tuple[int, int], ...]  # (member, matrix)
    holder: int | None = None


def assign(units: Sequence[Unit], shards: int, replicas: int) -> list[int]:
    """Position (replica * shards + shard) of every unit; units are sorted, longest first.

    Longest first (Graham 1969), each to the position with least FLOPs, then least bytes; units with a holder, to that
    of its replicas, and before all others where there is only one. With a few large sizes that can end far from even;
    then MULTIFIT (Coffman, Garey, Johnson 1978) is tried and the shorter of the two longest shares is taken.
    """
    positions = shards * replicas
    order = list(range(len(units)))
    if replicas == 1:
        order.sort(key=lambda i: units[i].holder is None)
    owners = longest_first(units, order, shards, positions)
    before, loads = [0] * positions, [0] * positions
    for unit, position in zip(units, owners):
        loads[position] += unit.flops
        before[position] += 0 if unit.holder is None else unit.flops
    free = [i for i, unit in enumerate(units) if unit.holder is None]
    least = max(shortest(units, positions), max(before))
    if free and max(loads) > EVEN * least:
        for i, position in multifit(units, free, before, least, max(loads)).items():
            owners[i] = position
    return owners


def longest_first(units: Sequence[Unit], order: Sequence[int], shards: int, positions: int) -> list[int]:
    """Position of every unit: in this order, each to the position (of its holder's) that has least so far.

    One heap for all positions and one a holder. An entry whose position has got more since then is thrown away when
    it comes up: the newer one is in the heap too.
    """
    owners = [-1] * len(units)
    shares = [(0, 0, position) for position in range(positions)]  # FLOPs, bytes, and the position to break ties
    heaps: dict[int | None, list[tuple[int, int, int]]] = {None: list(shares)}
    holders = dict.fromkeys(unit.holder for unit in units)
    heaps |= {holder: shares[holder::shards] for holder in holders if holder is not None}
    for i in order:
        unit = units[i]
        heap = heaps[unit.holder]
        while heap[0] != shares[heap[0][2]]:
            heapq.heappop(heap)
        flops, size, position = heap[0]
        owners[i] = position
        shares[position] = (flops + unit.flops, size + unit.bytes, position)
        for affected in (None, position % shards):
            if affected in heaps:
                heapq.heappush(heaps[affected], shares[position])
    return owners


def multifit(units: Sequence[Unit], free: Sequence[int], before: Sequence[int], low: int, high: int) -> dict[int, int]:
    """Unit -> position with the longest share below `high`, by bisection to a thousandth; empty where none is found."""
    sizes: dict[int, list[int]] = {}
    for i in sorted(free, key=lambda i: -units[i].flops):
        sizes.setdefault(units[i].flops, []).append(i)
    best: dict[int, int] = {}
    low -= 1  # never reached, nor tried
    while high - low > 1 + low // 1000:
        limit = (low + high) // 2
        found = packed(sizes, before, limit)
        if len(found) == len(free):
            best, high = found, limit
        else:
            low = limit
    return best


def packed(sizes: dict[int, list[int]], before: Sequence[int], limit: int) -> dict[int, int]:
    """Unit -> position, filling each up to the limit with the largest that fit (first-fit decreasing, by sizes)."""
    found: dict[int, int] = {}
    given = dict.fromkeys(sizes, 0)
    for position, load in enumerate(before):
        room = limit - load
        for size, members in sizes.items():  # descending
            first = given[size]
            count = min(len(members) - first, room // size if size else len(members))
            if count > 0:
                given[size] = first + count
                room -= count * size
                found.update((i, position) for i in members[first : first + count])
    return found


def shortest(units: Sequence[Unit], positions: int) -> int:
    """FLOPs below which no assignment of single matrices can bring the longest share.

    The mean; the largest matrix; and of the k * positions + 1 largest some position must hold k + 1, at the least
    the smallest k + 1 of them.
    """
    sizes = sorted((unit.flops // len(unit.matrices) for unit in units for _ in unit.matrices), reverse=True)
    sums = [0, *accumulate(sizes)]
    crowded = (sums[k * positions + 1] - sums[k * positions - k] for k in range(-(-len(sizes) // positions)))
    return max(-(-sums[-1] // positions), *crowded, 0)
