"""Kernels in passes on meshes: beside ranks that run the reference, and on replicas."""

from math import prod

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardopt
from shardopt.kernels.replay import Replay
from tests import test_mesh
from tests.threaded import run_threaded
from tests.virtual import bits


@pytest.mark.parametrize("kind", ["fsdp 4", "tp cols, fsdp", "tp rows, fsdp", "ep x fsdp", "hsdp 2x2"])
@pytest.mark.parametrize("name", ["adafactor", "adamw all"])
def test_ranks_with_and_without_a_compiler(kind, name, taken, monkeypatch):
    """Half of the ranks run kernels, the others the reference: the unsharded step. Kills: local sums in another shape,
    sums that leave a strided run or an empty shard out, a rank without elements that skips a round, a repeated round
    that asks kernel by kernel."""
    made, make = [], test_mesh.OPTIMIZERS[name]
    case = test_mesh.CASES[kind]
    # the first kernel's parameters do not follow each other
    monkeypatch.setitem(test_mesh.CASES, kind, case._replace(shapes=(*case.shapes, case.shapes[0])))

    def build(ps):
        opt = make(ps)
        if dist.is_initialized() and dist.get_rank() % 2:
            opt.native = None
        else:
            made.append(opt)
        return opt

    monkeypatch.setitem(test_mesh.OPTIMIZERS, name, build)
    test_mesh.test_equals_the_unsharded_step(kind, name)
    assert len(made) > 1 and all(opt.native.stepped > 0 for opt in made)
    if "cols" not in kind:  # else extremes of blocks are asked, of adafactor's by the reference
        assert all(taken) and len(taken) > 1  # steps are repeated
    assert name == "adafactor" or all(opt.native.left == 0 for opt in made)


@pytest.mark.parametrize("kind", ["tp rows", "hsdp 2x2", "ep x fsdp"])
@pytest.mark.parametrize("name", ["adafactor", "adamw all"])
def test_a_repeated_round_is_the_same_round(kind, name, taken, monkeypatch):
    """Taken the short way by all ranks or by none: the same bits and as many rounds and collectives. Kills: a message
    that is not sent, sent twice, without some members or put back elsewhere, sums that are not everybody's."""
    case, found = test_mesh.CASES[kind], []
    for possible in (True, False):
        monkeypatch.setattr(Replay, "possible", possible)
        body = test_mesh.on_mesh(case, test_mesh.OPTIMIZERS[name], torch.bfloat16)
        found.append(run_threaded(prod(case.sizes), body))
    assert taken == [True] * ((test_mesh.STEPS - 1) * prod(case.sizes))
    for (mine, counts, _), (others, expected, _) in zip(*found):
        assert counts == expected and counts[1] > 0
        for (p, state, *_), (q, stored, *_) in zip(mine, others):
            assert torch.equal(bits(p), bits(q)) and all(torch.equal(bits(state[n]), bits(stored[n])) for n in stored)


def test_replicas_of_ranks_are_bitwise_alike():
    """Kills: sums in the order in which threads finish."""

    def body(_):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "shards"))
        model = test_mesh.build(((70, 130), (33, 64)), torch.bfloat16)
        test_mesh.by_fsdp(model, mesh)
        ps = list(model)
        opt = shardopt.Adafactor(ps, rounding="stochastic", addons=["cautious"], fused=True)
        for seed in range(3):
            draw = torch.Generator().manual_seed(seed)
            for p in ps:
                full = torch.randn(p.shape, generator=draw).bfloat16()
                shard = full.chunk(2)[mesh.get_coordinate()[1]]
                p.grad = test_mesh.distributed(shard.contiguous(), p.shape, p.device_mesh, p.placements)
            opt.step()
        return mesh.get_coordinate(), [p._local_tensor.detach().clone() for p in ps]

    found = {tuple(where): ps for where, ps in run_threaded(4, body)}
    for shard in (0, 1):
        for p, q in zip(found[0, shard], found[1, shard]):
            assert torch.equal(bits(p), bits(q))


def test_what_is_required_is_refused_before_anything_is_written():
    """Steps from stored values stay on the reference where blocks lie on two ranks. Kills: a refusal after the first
    parameters moved."""

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        model = test_mesh.build(((64, 130), (64, 64)), torch.float32)
        test_mesh.by_hand(Shard(1))(model, mesh)
        ps = list(model)
        before = [p._local_tensor.detach().clone() for p in ps]
        opt = shardopt.AdamW(ps, state="int8", addons=["cautious"], update_from="stored", fused=True)
        for p in ps:
            p.grad = test_mesh.distributed(torch.ones_like(p._local_tensor), p.shape, mesh, p.placements)
        with pytest.raises(ValueError, match=r"stored.*blocks lie on several ranks"):
            opt.step()
        return all(torch.equal(p._local_tensor, q) for p, q in zip(ps, before))

    assert run_threaded(2, body) == [True, True]
