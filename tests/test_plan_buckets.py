"""Units, their order and buckets, by hand."""

from dataclasses import dataclass, field

import pytest

from shardopt.dtensor.buckets import Block, blocks, by_start, cut, divided, units_in
from shardopt.dtensor.owners import Unit
from tests.test_plan import matrix

ALL = 1e18  # FLOPs: no batch is too long


def sizes(members, slack=ALL):
    """Matrices of every unit."""
    return [len(unit.matrices) for unit in units_in(blocks(members, ("full",) * len(members), slack))]


def members_in(members, modes=None, slack=ALL):
    return [block.members for block in blocks(members, modes or ("full",) * len(members), slack)]


def test_batches_fill_a_gpu_as_even_as_can_be():
    """2048 x 2048 fill one, 4 of 1024 do. Kills: the long side counted; units of 4, 4 and 1; one unit too many."""
    assert sizes([matrix(2048, 4096)] * 3) == [1, 1, 1]
    assert sizes([matrix(1024, 4096)] * 9) == [3, 3, 3]
    assert sizes([matrix(1025, 4096)] * 3) == [1, 1, 1]
    assert sizes([matrix(1024, 1024)] * 8) == sizes([matrix(1024, 1024, count=8)]) == [4, 4]
    assert sizes([matrix(512, 512, count=20, holders=(0,) * 17 + (1,) * 3)]) == [8, 9, 3]


def test_batches_are_below_the_slack():
    one = matrix(64, 64).flops
    for slack, most in ((0, 1), (1.9 * one, 1), (2 * one, 2), (3.5 * one, 3)):
        assert max(sizes([matrix(64, 64)] * 6, slack)) == most == max(sizes([matrix(64, 64, count=6)], slack))


def test_batches_are_below_five_percent_of_the_shortest_share():
    """Kills: ten percent; five of what there is in all."""
    members = [matrix(64, 64)] * 50
    for shards, most in ((1, 2), (2, 1)):
        sequence, owners = divided(members, ("full",) * 50, shards, 1)
        assert max(len(unit.matrices) for unit in units_in(sequence)) == most
        assert len(owners) == len(units_in(sequence)) == 50 / most


def test_a_batch_has_one_shape_and_one_wire():
    """And in it the members' order. Kills: a tall and a wide matrix together, which cost alike; 8 and 16
    bits; batches that end at a stack between them."""
    members = [matrix(8, 16), matrix(16, 8), matrix(8, 16), matrix(8, 16, there=1.0), matrix(16, 8), matrix(16, 16)]
    assert members_in(members) == [(5,), (0, 2), (1, 4), (3,)]
    alike = [matrix(8, 16, flops=1.0), matrix(8, 32, flops=1.0, there=1.0, back=1.0)]
    assert members_in(alike) == [(0,), (1,)]
    stacks = [matrix(8, 8, holders=(0,)), matrix(8, 8), matrix(8, 8, count=2), matrix(8, 8), matrix(8, 8, holders=(0,))]
    assert sorted(members_in(stacks)) == [(0,), (1, 3), (2,), (4,)]


def test_longest_matrices_first_and_those_without_owner_last():
    members = [matrix(8, 8), matrix(64, 64), matrix(512, 512), matrix(32, 32)]
    assert members_in(members, ("full", "full", "gram", "full"), 0) == [(1,), (3,), (0,), (2,)]
    small = [*[matrix(8, 8)] * 9, matrix(16, 16)]  # 8 together are as long, 9 are longer
    assert members_in(small) == [tuple(range(9)), (9,)]
    assert members_in(small[1:]) == [(8,), tuple(range(8))]
    stack = matrix(8, 8, count=2, there=1.0)
    assert members_in([stack, stack, matrix(8, 8, count=2)]) == [(2,), (0,), (1,)]  # then what is most to send


def test_units_count_what_travels():
    """Kills: bytes of held matrices, of one way, or of one matrix of a batch; FLOPs of one."""
    free, held = matrix(8, 16, there=2.0, back=0.5), matrix(16, 16, count=2, holders=(1, 1))
    units = units_in(blocks([free, free, held], ("full",) * 3, ALL))
    assert units == [
        Unit(2 * int(held.flops), 0, ((2, 0), (2, 1)), 1),
        Unit(2 * int(free.flops), 2 * 128 * 5 // 2, ((0, 0), (1, 0))),
    ]


def test_blocks_follow_when_owners_begin_them():
    """Owner 0 has 4, 3, 1 in turn, owner 1 has 2, 2, 2; the two units of one block count as their mean.

    Kills: the first unit's begin for all; their sum; what owners have done forgotten; blocks without owner first."""
    owned = [((4,), (0,)), ((2,), (1,)), ((), ()), ((2,), (1,)), ((3, 2), (0, 1)), ((1,), (0,))]
    sequence = [
        Block((i,), tuple(Unit(flops, 0, ((i, k),)) for k, flops in enumerate(units)))
        for i, (units, _) in enumerate(owned)
    ]
    ordered = by_start(sequence, [owner for _, owners in owned for owner in owners])
    assert [block.members for block in ordered] == [(0,), (1,), (3,), (4,), (5,), (2,)]
    owned = [(0, (3,)), (1, (2, 2)), (3, (1,)), (2, (5,)), (4, ())]
    late = [Block((i,), tuple(Unit(flops, 0, ((i, k),)) for k, flops in enumerate(units))) for i, units in owned]
    assert [block.members[0] for block in by_start(late, [0, 0, 1, 0, 1])] == [0, 1, 2, 3, 4]


@dataclass
class Counted:
    """A tally of (bytes, balance) of one member after another."""

    rows: list
    seen: list = field(default_factory=list)

    @property
    def buffers(self):
        return sum(self.rows[i][0] for i in self.seen)

    @property
    def balance(self):
        return self.rows[self.seen[-1]][1]


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([(4, 1.0)] * 5, [[0, 1], [2, 3], [4]]),
        ([(5, 1.0)] * 4, [[0, 1], [2, 3]]),  # exactly full, exactly half full
        ([(5, 1.0), (4, 1.5), (3, 1.0)], [[0], [1, 2]]),  # ended where level
        ([(4, 1.0), (5, 1.5), (3, 1.0)], [[0, 1], [2]]),  # not below half
        ([(3, 1.0), (3, 1.0), (3, 1.0), (3, 1.0)], [[0, 1, 2], [3]]),  # of equals the last
        ([(3, 1.0), (3, 1.1), (3, 1.2), (3, 1.0)], [[0, 1], [2, 3]]),
        ([(12, 1.0), (12, 1.0), (1, 1.0)], [[0], [1], [2]]),  # beyond the limit
        ([(6, 1.0), (3, 1.5)], [[0, 1]]),  # the last one is not cut
        ([(4, 1.0), (6, 1.5), (1, 1.0)], [[0, 1], [2]]),
    ],
)
def test_buckets_end_where_ranks_are_level(rows, found):
    """Of 10 bytes. Kills: as full as can be; below half; the first of equals; a last bucket that is cut in two."""
    sequence = [Block((i,)) for i in range(len(rows))]
    made = cut(sequence, lambda: Counted(rows), lambda tally, i: tally.seen.append(i), 10)
    assert [[block.members[0] for block in bucket] for bucket in made] == found
