"""What an optimizer says of itself: before its first step whatever can be known, and how many steps it took."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

import shardopt
from tests.threaded import run_threaded


def plan_of(text):
    """The lines of the plan, from its summary on."""
    lines = text.splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("whole matrices"))
    return lines[first + 1 : -1]


def test_the_plan_is_told_before_the_first_step():
    """By one rank alone, and it is the plan that the step follows. Kills: a plan only once a step was taken, a report
    that compares plans between ranks, shards and replicas exchanged, frozen parameters planned for."""

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 3), mesh_dim_names=("replicas", "shards"))
        made = torch.Generator().manual_seed(0)
        placements = [Replicate(), Shard(0)]
        shapes = [(64, 96), (33, 20), (64, 96), (40, 40)]
        ps = [nn.Parameter(distribute_tensor(torch.randn(s, generator=made), mesh, placements)) for s in shapes]
        ps[3].requires_grad_(False)
        opt = shardopt.Muon(ps, orthogonalizer="gram", mode="auto")
        before = opt.explain() if rank == 4 else None
        for p in ps[:3]:
            p.grad = distribute_tensor(torch.randn(p.shape, generator=made), mesh, placements)
        opt.step()
        return before, opt.explain()

    before, after = run_threaded(6, body)[4]
    assert "if every parameter that requires a gradient gets one" in before and "if every" not in after
    assert plan_of(before) == plan_of(after) and "on 3 shards x 2 replicas" in before


def test_what_will_run_is_told_before_the_first_step():
    """With the dtype that is assumed of gradients. Kills: an assumption that is not said, meta taken for a device."""
    p, q = nn.Parameter(torch.ones(8, 8).bfloat16()), nn.Parameter(torch.ones(8).bfloat16())
    q.grad_dtype = torch.float32
    text = shardopt.AdamW([p, q]).explain()
    assert "if its gradient is bfloat16" in text and "if its gradient is float32" in text
    p.grad, q.grad = torch.ones_like(p), torch.ones(8)
    assert "if its gradient" not in shardopt.AdamW([p, q]).explain()
    meta = nn.Parameter(torch.empty(64, 64, device="meta"))
    assert "(it is on meta)" in shardopt.AdamW([meta]).explain()
    assert "1 parameter of 64x64" in shardopt.Muon([meta]).explain()
    assert "reference (a parameter is not contiguous)" in shardopt.SGD([nn.Parameter(torch.ones(8, 4).t())]).explain()


def test_steps_that_were_refused_are_not_counted():
    """Kills: a count, or a group begun, before the step is known to go through."""
    p = nn.Parameter(torch.ones(8, 4).t())
    opt = shardopt.SGD([p], fused=True)
    p.grad = torch.ones(4, 8)
    with pytest.raises(ValueError, match="not contiguous"):
        opt.step()
    assert opt.calls == 0 and "so far: 0 steps" in opt.explain()
    opt.param_groups[0]["momentum"] = 0.9  # as a scheduler may, before the first step
    p.data = p.data.contiguous()
    opt.step()
    assert opt.calls == 1 and "momentum_buffer" in opt.state[p]
    p.grad = torch.ones(4, 8).to_sparse()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()
    assert opt.calls == 1
