"""64 and 512 ranks without one of them: layouts, state shapes and bytes from a fake process group."""

import math

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard
from torch.testing._internal.distributed.fake_pg import FakeStore

import shardopt
from tests.table import weights
from tests.virtual import Axis, Rank

SHAPES = ((70, 130), (1024, 512), (64, 1024), (130, 9, 3, 3))


@pytest.fixture
def on_rank():
    """A function that becomes a rank of a fake group."""

    def become(rank, size):
        if dist.is_initialized():
            dist.destroy_process_group()
        dist.init_process_group("fake", rank=rank, world_size=size, store=FakeStore())

    yield become
    dist.destroy_process_group()


def sharded(shape, mesh, placements, rank):
    local = rank.cut(weights(shape))
    stride = torch.empty(shape, device="meta").stride()
    p = DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)
    return p.requires_grad_()  # nn.Parameter would ask a cache of DTensor's, which knows another rank's mesh


# mesh, placements, (axis, mesh axis) in cutting order; shapes whose sizes that cut allows
MESHES = {
    "fsdp 64": ((64,), (Shard(0),), [(Axis(64, 0), 0)], SHAPES),
    "hsdp 64": ((4, 16), (Replicate(), Shard(0)), [(Axis(4, None), 0), (Axis(16, 0), 1)], SHAPES),
    "fsdp x tp 64": (
        (8, 8),
        (_StridedShard(0, split_factor=8), Shard(0)),
        [(Axis(8, 0), 1), (Axis(8, 0), 0)],
        SHAPES[1:3],
    ),
    "fsdp 512": ((512,), (Shard(0),), [(Axis(512, 0), 0)], SHAPES),
    "hsdp x tp 512": (
        (4, 16, 8),
        (Replicate(), Shard(0), Shard(1)),
        [(Axis(4, None), 0), (Axis(16, 0), 1), (Axis(8, 1), 2)],
        SHAPES[1:3],
    ),
}


@pytest.mark.parametrize("name", MESHES)
def test_layouts_state_and_bytes(name, on_rank):
    """The layout is the independent one, local parts have its sizes, global shapes are those of one process.
    Kills: state at the global shape on every rank, blocks counted on the local shard."""
    sizes, placements, cuts, shapes = MESHES[name]
    world = math.prod(sizes)
    plain = shardopt.AdamW([nn.Parameter(weights(shape)) for shape in shapes])
    expected = [
        {n: (tuple(x.shape), x.dtype) for n, x in plain.state[p].items()} for p in plain.param_groups[0]["params"]
    ]
    for number in (0, 1, world // 3, world - 1):
        on_rank(number, world)
        mesh = init_device_mesh("cpu", sizes)
        here = mesh.get_coordinate()
        where = tuple(here[k] for _, k in cuts)
        ranks = [Rank(shape, tuple(axis for axis, _ in cuts), where) for shape in shapes]
        ps = [sharded(shape, mesh, placements, rank) for shape, rank in zip(shapes, ranks)]
        optimizer = shardopt.AdamW(ps)
        for p, rank, parts in zip(ps, ranks, expected):
            layout = optimizer.layout(p)
            assert layout.geo == rank.geo and layout.local_shape == rank.local_shape
            state = optimizer.state[p]
            assert {n: (tuple(x.shape), x.dtype) for n, x in state.items()} == parts
            codes = state["exp_avg.sqrt8"]
            assert codes._local_tensor.shape == p._local_tensor.shape and codes.placements == p.placements
            local = sum(x._local_tensor.numel() * x.element_size() for x in state.values() if isinstance(x, DTensor))
            whole = sum(math.prod(shape) * dtype.itemsize for shape, dtype in parts.values())
            assert local <= whole and (p._local_tensor.numel() or not local)
            if rank.numel == rank.view(p._local_tensor).numel() * (world // 4 if Replicate() in placements else world):
                assert local == pytest.approx(whole / (rank.numel / p._local_tensor.numel()), rel=0.15)
