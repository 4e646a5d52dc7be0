"""Buckets bound what is alive, keep the order of the rounds, and change no bit of any result."""

import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard

import shardopt
from shardopt import engine
from tests.small import params, same, train
from tests.test_mesh import build, by_hand, distributed
from tests.threaded import run_threaded

SHAPES = ((7, 15), (64, 96), (7,), (33, 64), (4, 32, 48), (2, 16))


def optimizer_of(ps):
    return shardopt.Adafactor(ps, beta1=0.9, addons=["orthograd", "cautious"])


def test_small_buckets_change_nothing_and_few_are_alive(monkeypatch):
    """At most three rounds are under way at once. Kills: all buckets started together (memory without a bound)."""
    ps, qs = params(SHAPES), params(SHAPES)
    train(optimizer_of(ps), ps, 3)
    optimizer = optimizer_of(qs)
    monkeypatch.setattr(engine, "BUCKET_ELEMENTS", 100)
    open_rounds, seen = set(), []
    start = optimizer.answers.start

    def counting(asked):
        round_ = start(asked)
        finish = round_.finish
        open_rounds.add(id(round_))
        seen.append(len(open_rounds))
        round_.finish = lambda: (open_rounds.discard(id(round_)), finish())[1]
        return round_

    monkeypatch.setattr(optimizer.answers, "start", counting)
    train(optimizer, qs, 3)
    assert same(ps, qs) and max(seen) == engine.ALIVE == 3 and not open_rounds


def test_a_bucket_is_cut_from_global_facts(monkeypatch):
    """Every rank cuts at the same parameters, though one of them is empty there. Kills: a bound on the local size,
    which deadlocks."""

    def body(_):
        mesh = init_device_mesh("cpu", (3,))
        model = build(((2, 16), (1, 5), (70, 13), (7,), (8, 8)), torch.float32)
        by_hand(Shard(0))(model, mesh)
        ps = list(model)
        optimizer = optimizer_of(ps)
        for p in ps:
            p.grad = distributed(torch.ones_like(p._local_tensor), p.shape, mesh, p.placements)
        optimizer.step()
        return [len(bucket) for bucket in engine.buckets(optimizer.items())], optimizer.answers.rounds

    monkeypatch.setattr(engine, "BUCKET_ELEMENTS", 20)
    results = run_threaded(3, body)
    assert results[0][0] == [2, 1, 1, 1] and results.count(results[0]) == 3


def test_a_bucket_holds_what_is_reduced_alike():
    """One bucket holds one mesh and one set of sharding axes, whatever came between: fewer messages."""

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        model = build(((4, 8), (8, 4), (4, 4)), torch.float32)
        placements = ((Shard(0),), (Replicate(),), (Shard(1),))
        for i, placement in enumerate(placements):
            one = build((tuple(model[i].shape),), torch.float32)
            by_hand(*placement)(one, mesh)
            model[i] = one[0]
        ps = list(model)
        optimizer = optimizer_of(ps)
        assert len(optimizer.state) == 3
        for p in ps:
            p.grad = distributed(torch.ones_like(p._local_tensor), p.shape, mesh, p.placements)
        return [len(bucket) for bucket in engine.buckets(optimizer.items())]

    assert run_threaded(2, body) == [[2, 1]] * 2
