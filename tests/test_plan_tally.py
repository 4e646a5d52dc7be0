"""What members cost the ranks, by hand: FLOPs, bytes sent, bytes held, seconds of every stage."""

from dataclasses import replace

import pytest

from shardopt.dtensor.cost import Costs, gram_flops, orthogonalize_flops
from shardopt.dtensor.member import Member
from shardopt.dtensor.tally import Tally

CUT = Member(rows=10, cols=4, count=3, flops=7, there=2, back=1.02)  # 40 elements; 80 bytes there, 41 back
HELD = Member(rows=6, cols=5, count=2, holders=(1, 1), flops=11, there=3, back=2)  # 30 elements, 90 + 60 bytes
GRAM = Member(rows=8, cols=4, count=2, there=2, back=1)  # 64 + 32 bytes
SLOW = Costs(gemm_flops=1, memory_bandwidth=1e9, launch=0, bandwidth_in=1, bandwidth_out=1, latency=0)


def tallied(*rows, shards=2, replicas=3, shared=True):
    tally = Tally(shards, replicas, shared)
    for member, mode, owners in rows:
        tally.add(member, mode, owners)
    return tally


def everything():
    """On 2 shards of 3 replicas: two matrices go to 0.0, one to 1.1; 0.1 and 2.1 get one each of what shard 1 holds."""
    return tallied((CUT, "full", (0, 0, 3)), (HELD, "full", (1, 5)), (GRAM, "gram", ()))


def test_flops():
    """Kills: matrices of one owner not summed; pieces, which all work on, left out of the mean or of the busiest."""
    tally = everything()
    even = 2 * (6 * 4 * 4 * 8 / 2 + 14 * 4**3)
    assert (tally.flops.by, tally.even, tally.matrices, tally.elements) == ({0: 14, 3: 7, 1: 11, 5: 11}, even, 7, 244)
    assert tally.mean == 43 / 6 + even
    assert tally.balance == (14 + even) / (43 / 6 + even)
    assert tallied().balance == 1.0


def test_bytes():
    """Kills: replicas mixed up, or one counted for another; results told by nobody, or to oneself; there for back."""
    tally = everything()
    told = 3 * 41 + 2 * 60
    assert tally.sent == (3 * 80 + 3 * 41) * 1 / 4 / 3 + told * 2 / 3 / 2 + 2 * (2 * 16 * 4) / 2
    pieces = 2 * 80 + 2 * 41 + told  # of replica 0, the fullest: 485, of which a shard has half, rounded up
    assert tally.buffers == 243 + (160 + 82) + 2 * 150 + (64 + 32) + 128 and pieces == 485


def test_bytes_of_one_shard_in_every_replica():
    """Kills: what the same shard owns in several replicas counted for one of them."""
    tally = tallied((CUT, "full", (0, 2, 4)))
    assert tally.buffers == 80 + 41 + (80 + 41 + 3 * 41) / 2
    assert tally.stages(SLOW)[0] == 80 / 2


def test_bytes_where_replicas_repeat_each_other():
    """Nothing is told. Kills: replicas counted though they are not asked."""
    tally = tallied((CUT, "full", (0, 0, 1)), shared=False)
    assert tally.positions == 2 and tally.mean == 21 / 2
    assert tally.sent == 3 * (80 + 41) / 4
    assert tally.buffers == 2 * 121 + 182  # 363 bytes of pieces
    assert tallied((CUT, "full", (0, 0, 0)), shards=1, replicas=1, shared=False).buffers == 3 * 121
    assert tallied((CUT, "full", (0, 0, 0)), shards=1, replicas=1, shared=False).sent == 0


def test_seconds_of_stages():
    """A byte or FLOP a second: half of what 0.0 gets and of what it returns is another's, and then replicas tell.

    Kills: stages mixed up; Gram matrices that cost nothing; results told by all to all."""
    gather, compute, back = everything().stages(SLOW)
    assert gather == 160 / 2 + 2 * 128 / 2
    assert compute == 14 + 2 * (6 * 4 * 4 * 8 / 2 + 14 * 4**3)
    assert back == pytest.approx(82 / 2 + (3 * 41 + 2 * 60) / 2 * 2 / 3)


def test_replicas_tell_across_nodes():
    """Shards of one replica fill a node, so that replicas are on others. Kills: neighbours taken for replicas."""
    far = Costs(bandwidth_in=1e9, bandwidth_out=2, latency=0, launch=0, ranks_per_node=2)
    tally = tallied((HELD, "full", (1, 5)))
    assert tally.stages(far)[2] == 2 * 60 / 2 * 2 / 3 / 2


def test_nothing_sent_takes_no_time():
    """Kills: latencies and launches of messages and products that are not there."""
    late = Costs(latency=1, launch=1)
    assert tallied().stages(late) == (0, 0, 0)
    assert tallied((HELD, "full", (1, 1)), replicas=1, shared=False).stages(late) == (0, 17, 0)
    assert tallied((GRAM, "gram", ()), replicas=1, shared=False).stages(late)[::2] == (pytest.approx(2), 0)


def test_products_of_one_owner():
    """One batch a shape, the busiest rank's. Kills: one batch a matrix; one of all; all ranks in turn."""
    other = Member(rows=4, cols=10, count=1, flops=9, there=2, back=2)
    launches = Costs(launch=1)
    tally = tallied((CUT, "full", (0, 0, 1)), (other, "full", (0,)), replicas=1, shared=False)
    assert tally.compute(launches) == 2 * 17
    assert tally.compute(SLOW) == 7 + 7 + 9
    assert tally.compute(Costs(gemm_flops=1e12, memory_bandwidth=12, launch=0)) == 3 * 40
    gram = tallied((GRAM, "gram", ()), replicas=1, shared=False)
    assert gram.compute(Costs(gemm_flops=1e12, memory_bandwidth=12, launch=0)) == 2 * 32 / 2
    assert gram.compute(launches) == 17


def test_given_flops_of_pieces():
    """Of another number of steps: in proportion. Kills: five steps for all."""
    usual = orthogonalize_flops(8, 4)
    half = Member(rows=8, cols=4, count=2, flops=usual / 2, there=2, back=1)
    assert tallied((half, "gram", ())).even == 2 * (gram_flops(8, 4, 2) // 2)
    assert tallied((half, "local", ())).even == orthogonalize_flops(4, 4)


def test_local_pieces():
    """Rows, or columns where these are cut, rounded up; of a stack that is held what the fullest shard holds."""
    rows, cols = (Member(rows=9, cols=6, cut=cut, count=2, there=2, back=1) for cut in (-2, -1))
    assert tallied((rows, "local", ()), shards=4).even == 2 * orthogonalize_flops(3, 6)
    assert tallied((cols, "local", ()), shards=4).even == 2 * orthogonalize_flops(9, 2)
    held = Member(rows=9, cols=6, count=3, holders=(0, 1, 1), there=2, back=1)
    assert tallied((held, "local", ())).even == 2 * orthogonalize_flops(9, 6)
    assert tallied((held, "local", ())).buffers == 3 * (108 + 54) / 2
    assert tallied((Member(rows=9, cols=6, count=0, holders=(), there=2, back=1), "local", ())).even == 0


def test_members():
    """Kills: bytes rounded down; squares cut along columns, or along nothing; 1x before a single matrix."""
    odd = Member(rows=3, cols=3, cut=-1, there=0.5, back=0.7)
    assert (odd.bytes_there, odd.bytes_back, odd.shape, replace(odd, count=2).shape) == (5, 7, "3x3", "2x3x3")
    assert [replace(odd, cut=cut).long_side_cut for cut in (-2, -1, None)] == [True, True, False]
    assert [replace(odd, rows=4, cut=cut).long_side_cut for cut in (-2, -1, None)] == [True, False, False]
    assert [replace(odd, cols=4, cut=cut).long_side_cut for cut in (-2, -1, None)] == [False, True, False]
    for name in ("rows", "cols", "count", "flops", "there", "back"):
        with pytest.raises(ValueError, match=f"{name}=-1"):
            replace(odd, **{name: -1})
