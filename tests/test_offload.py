"""Offloaded FSDP2 parameters: a CUDA mesh, but parameters, gradients and state on the CPU (no GPU needed)."""

import copy

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardopt
from shardopt.dtensor.layout import wrap
from tests.table import gradients, weights

SHAPE = (64, 256)
ROWS = slice(16, 32)  # of rank 1 of 4


def test_offloaded_parameters():
    """State stays where the parameter is, and the step is the unsharded one's.

    Kills: state through from_local, which moves it to the mesh's device; a device asked of the mesh.
    """
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = DeviceMesh("cuda", [0, 1, 2, 3])
        p = wrap(weights(SHAPE)[ROWS].clone(), mesh, (Shard(0),), SHAPE).requires_grad_()
        whole = weights(SHAPE).clone().requires_grad_()
        opt, other = shardopt.AdamW([p], lr=1e-2), shardopt.AdamW([whole], lr=1e-2)
        for g in gradients(SHAPE, 3):
            p.grad, whole.grad = wrap(g[ROWS].clone(), mesh, (Shard(0),), SHAPE), g
            opt.step()
            other.step()
        assert p._local_tensor.equal(whole[ROWS])
        for name, part in opt.state[p].items():
            local = getattr(part, "_local_tensor", part)
            assert local.device.type == "cpu"
            expected = other.state[whole][name]
            assert local.equal(expected if expected.ndim == 0 else expected[ROWS])
        opt.load_state_dict(copy.copy(opt.state_dict()))
        assert opt.answers.collectives == 0
    finally:
        dist.destroy_process_group()
