"""The memory of messages: reserved once, bounded by the largest buckets, never written while somebody reads it."""

from functools import partial

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

from shardopt import Recipe, ShardedOptimizer
from shardopt.dtensor.exchange import pack, unpacked
from shardopt.dtensor.plan import plan
from shardopt.dtensor.reserve import Reserve
from tests.test_whole_order import log, stepped  # noqa: F401
from tests.threaded import run_threaded
from tests.virtual import Axis, bits
from tests.whole_kit import Asker, local, placed, train

CPU = torch.device("cpu")


def test_the_smallest_that_fits_is_taken_and_one_too_small_is_replaced():
    """Kills: the first that fits; a buffer more for every size."""
    reserve = Reserve()
    large, small = reserve.take(100, CPU), reserve.take(10, CPU)
    reserve.give(large)
    reserve.give(small)
    assert reserve.take(10, CPU) is small and reserve.take(11, CPU) is large and not reserve.free
    reserve.give(large)
    reserve.give(small)
    largest = reserve.take(101, CPU)
    assert len(largest) == 101 and reserve.free == [small]


def test_what_is_still_read_is_not_given_to_another():
    """Kills: a buffer taken again under a view of it."""
    reserve = Reserve()
    buffer = reserve.take(16, CPU)
    reserve.give(buffer, [torch.zeros(4), buffer[4:8].view(torch.float32)])
    assert not reserve.free
    reserve.give(buffer, [torch.zeros(4)])
    assert reserve.free == [buffer]


def test_a_segment_is_written_into_memory_that_held_something_else():
    """Kills: padding that is left as it was; a message that grows its buffer."""
    sent = [[torch.arange(3, dtype=torch.uint8), torch.tensor([1.5])], [], [torch.tensor([7], dtype=torch.int8)]]
    into = torch.full((12,), 255, dtype=torch.uint8)
    pack(sent, into)
    shapes = [((3,), torch.uint8), ((1,), torch.float32)]
    assert all(torch.equal(a, b) for a, b in zip(unpacked(into[:8], shapes), sent[0]))
    assert into[7] == 0 and into[8:].tolist() == [7, 0, 0, 0]


def test_messages_of_all_buckets_share_what_was_reserved_in_the_first(log, monkeypatch):  # noqa: F811
    """Five buckets, no more memory than three of them need, none of it new in a later step.

    Kills: buffers that are not given back; two that are where one would do.
    """
    made, taken = [], Reserve.take

    def take(self, size, device):
        before = {id(buffer) for buffer in self.free}
        buffer = taken(self, size, device)
        made.append((buffer, id(buffer) in before))
        return buffer

    monkeypatch.setattr(Reserve, "take", take)
    found = stepped(log, (4,), (Shard(0),), [(Axis(4, 0), 0)], there="int8(block=16)", back="int8(block=16)")
    fresh = [len(buffer) for buffer, reused in made if not reused]
    assert len(found.buckets) == 5 and len(made) == 2 * 2 * 5 * 2
    assert log.most <= sum(fresh) <= found.buffers
    assert all(reused for _, reused in made[len(made) // 2 :])


@pytest.mark.parametrize("wires", [("fp32", "fp32"), ("bf16", "fp32"), ("fp32", "int8"), ("int8", "int8")])
def test_small_buckets_read_what_came_for_them(wires):
    """One matrix a rank and bucket, so that every buffer is taken again and again; bits as on one device.

    Kills: a buffer that stays free when it is taken.
    """

    def body(ranks):
        place = (init_device_mesh("cpu", (ranks,)), (Shard(0),), [(Axis(ranks, 0), 0)]) if ranks else None
        ps, cuts = placed(((32, 16),) * 8, [place] * 8)
        optimizer = ShardedOptimizer(ps, Recipe(Asker(there=wires[0], back=wires[1])))
        optimizer.answers.planner = partial(plan, bucket_bytes=1)
        train(optimizer, ps, cuts, steps=3)
        return [local(p) for p in ps]

    whole = body(0)
    for rank, found in enumerate(run_threaded(2, lambda _: body(2))):
        assert all(bits(a.chunk(2)[rank]).equal(bits(b)) for a, b in zip(whole, found))
