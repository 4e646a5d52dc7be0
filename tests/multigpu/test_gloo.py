"""Three real processes on gloo, uneven shards and an empty one: torch.optim unsharded, in one spawn of many cases."""

from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import shardopt
from tests.processes import run_processes
from tests.table import gradients, weights
from tests.test_parity import TWINS, draws, near, relative
from tests.virtual import bits

RANKS, STEPS = 3, 50
SHAPES = ((7, 15), (2, 16), (1, 1), (7,), (33, 64), (70, 130))

BITWISE = {  # nothing is asked: the same bits as one process, whatever the state
    "int8": lambda p: shardopt.AdamW(p, lr=0.01, rounding="stochastic"),
    "int4": lambda p: shardopt.AdamW(p, lr=0.01, state="int4", nonfinite="skip"),
    "lion": lambda p: shardopt.Lion(p, lr=0.01, state="fp8", rounding="stochastic"),
}


def build(dtype=torch.float32):
    return nn.ParameterList([weights(shape, dtype, seed=i) for i, shape in enumerate(SHAPES)])


def step(optimizer, ps, every, t):
    """One step on the gradients of step t, cut as torch.chunk does."""
    for p, gs in zip(ps, every):
        g = gs[t].to(p.dtype)
        if isinstance(p, DTensor):
            rows = -(-g.shape[0] // RANKS)
            local = g[dist.get_rank() * rows : (dist.get_rank() + 1) * rows].clone()
            g = DTensor.from_local(
                local, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride()
            )
        p.grad = g
    optimizer.step()


def both(make, make_whole, dtype, every):
    """(unsharded parameters, sharded ones gathered) after steps on the same gradients, every[i][t]."""
    whole, model = build(dtype), build(dtype)
    fully_shard(model, mesh=init_device_mesh("cpu", (RANKS,)))
    optimizers = (make_whole(list(whole)), make(list(model)))
    for t in range(len(every[0])):
        for optimizer, ps in zip(optimizers, (list(whole), list(model))):
            step(optimizer, ps, every, t)
    locals_ = [p._local_tensor.numel() for p in model]
    assert dist.get_rank() < 2 or locals_[1] == locals_[2] == 0, "an empty shard is part of the test"
    return list(whole), [p.full_tensor() for p in model]


def every_optimizer(rank, world_size, folder):
    normal = list(zip(*draws(SHAPES, STEPS)))
    for name, (ours, theirs, options) in TWINS.items():
        state = "factored" if ours is shardopt.Adafactor else "fp32"
        whole, found = both(partial(ours, state=state, **options), partial(theirs, **options), torch.float32, normal)
        for i, (p, q) in enumerate(zip(whole, found)):
            distance = relative(q, p, weights(SHAPES[i], seed=i))
            assert distance < near(p), f"{name}, {SHAPES[i]}: {distance}"
    awkward = [list(gradients(shape, 5, seed=i)) for i, shape in enumerate(SHAPES)]
    for name, make in BITWISE.items():
        whole, found = both(make, make, torch.bfloat16, awkward)
        assert all(bits(p.detach()).equal(bits(q.detach())) for p, q in zip(whole, found)), name


@pytest.mark.multigpu
def test_three_uneven_ranks_equal_torch(tmp_path):
    """fp32 AdamW, Adam, SGD, RMSprop and Adafactor after 50 steps to 1e-6; quantised AdamW and Lion bitwise.
    Kills: an answer that is not reduced, a rank without rows that does not take part."""
    run_processes(RANKS, every_optimizer, tmp_path)
