"""Which rank gets which work: longest first, and where that leaves ranks uneven, packed under a bisected limit.

Everything is counted in whole FLOPs and bytes and every tie is broken by position, so that all ranks find the same.
"""

import heapq
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

EVEN = 1.05  # the longest share over the shortest possible that counts as balanced


class Unit(NamedTuple):
    """Matrices of one shape that go to one owner together. holder: their shard position where they cannot move."""

    flops: int
    bytes: int
    matrices: tuple[tuple[int, int], ...]  # (member, matrix)
    holder: int | None = None


Kind = tuple[int, int | None]  # FLOPs and holder of a unit


def assign(units: Sequence[Unit], shards: int, replicas: int, least: int) -> list[int]:
    """Position (replica * shards + shard) of every unit; of those with a holder, that of one of its replicas.

    Longest first (Graham 1969), each to the position with least FLOPs, then least bytes: units with a holder before
    all others, then before those as long. Both can end far from even: held units that came first leave no rank for a
    long one, in the other order free ones lie where held ones must go. Then all are packed anew by MULTIFIT (Coffman,
    Garey, Johnson 1978). The first that is even enough is taken, else the shortest longest share. least: no share
    below can be reached.
    """
    held_first = sorted(range(len(units)), key=lambda i: (units[i].holder is None, -units[i].flops))
    longest_first = sorted(held_first, key=lambda i: -units[i].flops)
    tries = []
    for order in dict.fromkeys((tuple(held_first), tuple(longest_first))):
        tries.append(greedy(units, order, shards, shards * replicas))
        if longest(units, tries[-1]) <= EVEN * least:
            return tries[-1]
    best = min(tries, key=lambda owners: longest(units, owners))
    return multifit(units, shards, replicas, least, longest(units, best)) or best


def longest(units: Sequence[Unit], owners: Sequence[int]) -> int:
    """FLOPs of the longest share."""
    loads: dict[int, int] = {}
    for unit, position in zip(units, owners):
        loads[position] = loads.get(position, 0) + unit.flops
    return max(loads.values(), default=0)


def greedy(units: Sequence[Unit], order: Sequence[int], shards: int, positions: int) -> list[int]:
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


def multifit(units: Sequence[Unit], shards: int, replicas: int, low: int, high: int) -> list[int]:
    """Position of every unit with the longest share below `high`, by bisection to a thousandth; empty: none found.

    Under every limit what is held is packed before what is free, then anew in the order of sizes alone.
    """
    kinds: dict[Kind, list[int]] = {}
    for i in sorted(range(len(units)), key=lambda i: (-units[i].flops, units[i].holder is None)):
        kinds.setdefault((units[i].flops, units[i].holder), []).append(i)
    by_size = list(kinds.items())
    orders = sorted(by_size, key=lambda entry: entry[0][1] is None), by_size
    best: list[int] = []
    low -= 1  # never reached, nor tried
    while high - low > max(1, low // 1000):
        limit = (low + high) // 2
        if found := packed(orders[0], shards, replicas, limit) or packed(orders[1], shards, replicas, limit):
            best, high = [found[i] for i in range(len(units))], limit
        else:
            low = limit
    return best


def packed(kinds: Iterable[tuple[Kind, list[int]]], shards: int, replicas: int, limit: int) -> dict[int, int]:
    """Unit -> position: kind by kind, as many as fit below the limit where most is, then where less is (best fit).

    Empty where some do not fit.
    """
    found: dict[int, int] = {}
    room = [limit] * (shards * replicas)
    positions = range(shards * replicas)
    for (size, holder), units in kinds:
        first = 0
        for position in sorted(positions if holder is None else positions[holder::shards], key=room.__getitem__):
            fitting = units[first : first + room[position] // size if size else None]
            first += len(fitting)
            room[position] -= len(fitting) * size
            found.update(dict.fromkeys(fitting, position))
        if first < len(units):
            return {}
    return found


def shortest(units: Sequence[Unit], shards: int, replicas: int = 1) -> int:
    """FLOPs below which no assignment of single matrices can bring the longest share: of all, and of every holder's."""
    sizes: dict[int | None, list[int]] = {None: []}
    for unit in units:
        each = [unit.flops // len(unit.matrices)] * len(unit.matrices)
        for holder in {None, unit.holder}:
            sizes.setdefault(holder, []).extend(each)
    return max(floor(of, shards * replicas if holder is None else replicas) for holder, of in sizes.items())


def floor(sizes: Sequence[int], positions: int) -> int:
    """What some position gets at the least.

    The mean; the largest matrix; and of the k * positions + 1 largest some position must hold k + 1, at the least
    the smallest k + 1 of them.
    """
    sums = [0, *accumulate(sorted(sizes, reverse=True))]
    crowded = (sums[k * positions + 1] - sums[k * positions - k] for k in range(-(-len(sizes) // positions)))
    return max(-(-sums[-1] // positions), *crowded, 0)
