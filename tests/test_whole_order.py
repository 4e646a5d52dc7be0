"""How buckets of whole matrices follow one another: what is on its way while which one is worked on, and how much."""

import math
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardopt import Recipe, ShardedOptimizer
from shardopt.dtensor import answer, schedule
from shardopt.dtensor.plan import plan
from tests.threaded import run_threaded
from tests.virtual import Axis, bits
from tests.whole_kit import Asker, Mix, local, placed, train

COUNT = 20  # matrices; with the smallest buckets one a rank and bucket


class Log:
    """What happened, in order. flying: bytes of messages sent and not waited for yet; most: their maximum."""

    def __init__(self):
        self.events, self.flying, self.most = [], 0, 0

    def send(self, arriving, leaving, arriving_sizes, leaving_sizes, group, async_op):
        arriving.zero_()
        sent = Sent(self, len([event for event in self.events if event[0] == "send"]), arriving, leaving)
        self.events.append(("send", sent.number))
        self.flying += sent.bytes
        self.most = max(self.most, self.flying)
        return sent

    def named(self, names):
        """The events, messages by the names that they should have in the order in which they were sent."""
        return [" ".join([what, *(names[i] for i in number)]) for what, *number in self.events]


class Sent:
    """A message of a fake group that says when it is waited for."""

    def __init__(self, log, number, arriving, leaving):
        self.log, self.number, self.bytes = log, number, arriving.numel() + leaving.numel()

    def wait(self):
        self.log.events.append(("wait", self.number))
        self.log.flying -= self.bytes


class Logged(Mix):
    """A work that is written down."""

    def __call__(self, x):
        LOG[-1].events.append(("work",))
        return x.clone()


LOG: list[Log] = []


@pytest.fixture
def log(monkeypatch):
    """Of rank 1 in a fake group of four."""
    LOG.append(Log())
    dist.init_process_group("fake", rank=1, world_size=4, store=FakeStore())
    monkeypatch.setattr(dist, "all_to_all_single", LOG[-1].send)
    yield LOG[-1]
    dist.destroy_process_group()


def stepped(log, sizes, placements, axes, there="fp32", back="fp32", **options):
    """The plan, after a step that was written down."""
    mesh = init_device_mesh("cpu", sizes)
    ps, cuts = placed(((32, 16),) * COUNT, [(mesh, placements, axes)] * COUNT)
    optimizer = ShardedOptimizer(ps, Recipe(Asker(work=Logged(), there=there, back=back)))
    optimizer.answers.planner = partial(plan, bucket_bytes=1, **options)
    train(optimizer, ps, cuts, steps=1)
    log.events.clear()
    train(optimizer, ps, cuts, steps=1)
    return next(iter(optimizer.answers.scheduled.tasks.values())).plan


def test_one_bucket_gathers_while_another_is_worked_on_and_a_third_returns(log):
    """Kills: the oldest bucket first, which waits for what was just sent; buckets one after another."""
    found = stepped(log, (4,), (Shard(0),), [(Axis(4, 0), 0)])
    n = len(found.buckets)
    assert n == COUNT // 4
    names, expected = ["G0"], ["send G0"]
    for k in range(n):
        names += [*([f"G{k + 1}"] if k + 1 < n else []), f"R{k}"]
        expected += [f"send G{k + 1}"] if k + 1 < n else []
        expected += [f"wait G{k}", "work", f"send R{k}"]
        expected += [f"wait R{k - 1}"] if k else []
    assert log.named(names) == [*expected, f"wait R{n - 1}"]
    assert 0 < log.most <= found.buffers


def test_replicas_that_share_tell_their_results_while_the_next_are_worked_on(log):
    """A message more, so a bucket more under way. Kills: a third message that everybody waits for."""
    found = stepped(log, (2, 2), (Replicate(), Shard(0)), [(Axis(2, 0), 1)], share=True)
    n = len(found.buckets)
    names, expected = ["G0"], ["send G0"]
    for k in range(n + 2):
        if k + 1 < n:
            names, expected = [*names, f"G{k + 1}"], [*expected, f"send G{k + 1}"]
        if k < n:
            names, expected = [*names, f"R{k}"], [*expected, f"wait G{k}", "work", f"send R{k}"]
        if 0 < k <= n:
            names, expected = [*names, f"T{k - 1}"], [*expected, f"wait R{k - 1}", f"send T{k - 1}"]
        if k > 1:
            expected = [*expected, f"wait T{k - 2}"]
    assert n >= 4 and log.named(names) == expected
    assert 0 < log.most <= found.buffers * 4 / 3


@pytest.mark.parametrize("ranks", [None, 2], ids=["one device", "experts"])
def test_what_sends_nothing_is_in_small_buckets_too(monkeypatch, ranks):
    """Nothing but the elements bounds them; the bits are the same, and what travels stays as planned.

    Kills: one bucket of all that is local, in lock step, with every matrix and its result alive.
    """
    shapes = ((4, 8, 40), (12, 16), (6, 32, 40), (2, 16, 40), (16, 16))

    def body(_=0):
        place = None if ranks is None else (init_device_mesh("cpu", (ranks,)), (Shard(0),), [(Axis(ranks, 0), 0)])
        ps, cuts = placed(shapes, [place] * len(shapes))
        optimizer = ShardedOptimizer(ps, Recipe(Asker(there="int8", back="int8")))
        train(optimizer, ps, cuts)
        return [local(p) for p in ps], optimizer.answers.scheduled.buckets

    def run():
        return [body()] if ranks is None else run_threaded(ranks, body)

    before = run()
    monkeypatch.setattr(schedule, "ELEMENTS", 2000)
    for (one, whole), (other, parts) in zip(before, run()):
        assert all(bits(a).equal(bits(b)) for a, b in zip(one, other))
        assert len(whole) == 1 and sorted(sum(parts, ())) == list(range(len(shapes)))
        moving = {1, 4} if ranks else set()
        assert set(parts[0]) == moving or not moving
        for bucket in parts:
            size = sum(math.prod(shapes[i]) for i in bucket) // (ranks or 1)
            assert len(bucket) == 1 or size <= 2000 or set(bucket) == moving


def test_sets_of_gradients_that_take_turns_are_planned_once(monkeypatch):
    """As many as there is room for; what is used in every other step stays, and one warning says that there is none.

    Kills: the oldest plan given up though it is used; a plan in every step; no bound; a warning in every step.
    """
    ps = [torch.nn.Parameter(torch.zeros(8, 16)) for _ in range(6)]
    optimizer = ShardedOptimizer(ps, Recipe(Asker(work=Logged())))
    planned = []
    optimizer.answers.planner = lambda *args, **options: planned.append(1) or plan(*args, **options)

    def step(*chosen):
        for i, p in enumerate(ps):
            p.grad = torch.ones(8, 16) if i in chosen else None
        planned.clear()
        optimizer.step()
        return len(planned)

    LOG.append(Log())
    monkeypatch.setattr(answer, "KEPT", 8)  # two parameters each: four sets
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step(0, i) for i in (1, 2, 3, 4)] == [1] * 4
        assert [step(0, i) for i in (1, 2, 3, 4) * 2] == [0] * 8
    with pytest.warns(UserWarning, match="5 different sets.*zero_grad"):
        assert step(0, 5) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [step(0, i) for i in (2, 1, 2, 3, 2, 4)] == [0, 1, 0, 1, 0, 1]
        monkeypatch.setattr(answer, "KEPT", 5)
        assert [step(*range(6)), step(*range(6))] == [1, 0]  # one that is larger than all the room
