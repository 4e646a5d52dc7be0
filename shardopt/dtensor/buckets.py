"""Cuts the work into units that one owner multiplies in one batch, and into buckets that follow one another."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

from shardopt.dtensor.member import Member
from shardopt.dtensor.owners import EVEN, Unit, assign, shortest
from shardopt.dtensor.tally import Tally

FILL = 2048  # rows of a square product whose 256 tiles of 128 x 128 fill a GPU of 132 multiprocessors


class Block(NamedTuple):
    """Members that stay in one bucket, and the units of their matrices."""

    members: tuple[int, ...]
    units: tuple[Unit, ...] = ()


def divided(members: Sequence[Member], modes: Sequence[str], shards: int, copies: int) -> tuple[list[Block], list[int]]:
    """The blocks, and the position of each of their units.

    A batch is below 5 % of the shortest possible longest share: no share has been seen to grow by more than that.
    """
    least = shortest(units_in(blocks(members, modes, 0)), shards, copies)
    sequence = blocks(members, modes, (EVEN - 1) * least)
    return sequence, assign(units_in(sequence), shards, copies, least)


def units_in(sequence: Sequence[Block]) -> list[Unit]:
    return [unit for block in sequence for unit in block.units]


def blocks(members: Sequence[Member], modes: Sequence[str], slack: float) -> list[Block]:
    """All members, longest matrices first, then those that have no owner; ties in the members' order.

    Small matrices of one shape go in batches that fill a GPU, of at most `slack` FLOPs: longest-first ends at most one
    unit above the mean.
    """
    whole = [i for i, mode in enumerate(modes) if mode == "full"]
    kind = partial(kind_of, members)
    found = []
    for _, run in groupby(sorted(whole, key=kind), key=kind):
        of_kind = list(run)
        first = members[of_kind[0]]
        filling = max(1, FILL // max(1, min(first.rows, first.cols))) ** 2
        size = max(1, min(filling, int(slack // max(1.0, first.flops))))
        if first.count == 1 and first.holders is None:
            units = units_of(members, [(i, 0) for i in of_kind], size)
            found += [Block(tuple(i for i, _ in unit.matrices), (unit,)) for unit in units]
        else:
            found += [Block((i,), tuple(stack_units(members, i, size))) for i in of_kind]
    found.sort(key=lambda block: -max((unit.flops for unit in block.units), default=0))
    return found + [Block((i,)) for i, mode in enumerate(modes) if mode != "full"]


def kind_of(members: Sequence[Member], i: int) -> tuple[float, ...]:
    """Longest first; matrices of one kind can be one batch, a stack and what is held are kinds of their own."""
    member = members[i]
    alone = member.count != 1 or member.holders is not None
    travelling = member.bytes_there + member.bytes_back
    return -member.flops, -travelling, member.rows, member.cols, i if alone else -1


def stack_units(members: Sequence[Member], i: int, size: int) -> Iterator[Unit]:
    """Units of one parameter: matrices with one holder stay together as far as `size` allows."""
    holders = members[i].holders
    if holders is None:
        yield from units_of(members, [(i, matrix) for matrix in range(members[i].count)], size)
        return
    held: dict[int, list[tuple[int, int]]] = {}
    for matrix, holder in enumerate(holders):
        held.setdefault(holder, []).append((i, matrix))
    for holder, matrices in held.items():
        yield from units_of(members, matrices, size, holder)


def units_of(
    members: Sequence[Member], matrices: Sequence[tuple[int, int]], size: int, holder: int | None = None
) -> Iterator[Unit]:
    """The matrices in order, in units as even as can be of at most `size`."""
    count = -(-len(matrices) // size)
    for k in range(count):
        piece = tuple(matrices[len(matrices) * k // count : len(matrices) * (k + 1) // count])
        member = members[piece[0][0]]
        each = 0 if holder is not None else member.bytes_there + member.bytes_back
        yield Unit(int(member.flops) * len(piece), each * len(piece), piece, holder)


def by_start(sequence: Sequence[Block], owners: Sequence[int]) -> list[Block]:
    """Blocks in the order in which owners, each working through its units in turn, would begin them.

    So the ranks move through any assignment abreast. Blocks without owners come last. owners: of the units, in order.
    """
    done: dict[int, int] = {}
    positions = iter(owners)
    starts = []
    for block in sequence:
        begun = []
        for unit in block.units:
            position = next(positions)
            begun.append(done.get(position, 0))
            done[position] = begun[-1] + unit.flops
        starts.append(sum(begun) // len(begun) if begun else None)
    last = max(done.values(), default=0)
    order = sorted(range(len(sequence)), key=lambda k: last if (start := starts[k]) is None else start)
    return [sequence[k] for k in order]


def cut(
    sequence: Sequence[Block], new: Callable[[], Tally], add: Callable[[Tally, int], None], limit: int
) -> list[list[Block]]:
    """Buckets of blocks, in order: each as full as `limit` bytes of buffers allow, ended where the ranks are level.

    Of the places where a bucket could end, at least half full, the most level one is taken, of equals the last. A
    block beyond the limit is a bucket by itself. new: an empty tally; add: adds a member to it.
    """
    buckets: list[list[Block]] = []
    waiting = list(reversed(sequence))
    while waiting:
        tally, best, level = new(), 0, float("inf")
        bucket: list[Block] = []
        while waiting:
            for i in waiting[-1].members:
                add(tally, i)
            if bucket and tally.buffers > limit:
                break
            bucket.append(waiting.pop())
            if 2 * tally.buffers >= limit and tally.balance <= level:
                best, level = len(bucket), tally.balance
        if waiting and best:
            waiting.extend(reversed(bucket[best:]))
            bucket = bucket[:best]
        buckets.append(bucket)
    return buckets
