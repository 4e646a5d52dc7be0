"""Whole matrices between four real processes on gloo: every kind of mesh in one spawn, bitwise one device."""

from functools import partial

import pytest
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardopt import Recipe, ShardedOptimizer
from shardopt.dtensor.plan import plan
from shardopt.polar import Gram
from tests.processes import run_processes
from tests.virtual import Axis, bits
from tests.whole_kit import Asker, groups, local, placed, train

RANKS = 4
WIRES = (("fp32", "fp32"), ("bf16", "bf16"), ("int8(block=32)", "int4(block=8)"))
UNEVEN = ((7, 15), (2, 16), (70, 130), (66, 9, 3, 3), (4, 32, 48), (7,))
EVEN = ((8, 16), (64, 128), (36, 258))
STRIPES = (_StridedShard(0, split_factor=2), Shard(0)), [(Axis(2, 0), 1), (Axis(2, 0), 0)]
ROWS, COLS, PAIR = [(Axis(4, 0), 0)], [(Axis(4, 1), 0)], [[0, 1], [2, 3]]

CASES = {  # ranks of the mesh, placements and axes, shapes, options of the planner
    "rows": ([0, 1, 2, 3], ((Shard(0),), ROWS), UNEVEN, {"bucket_bytes": 4096}),
    "columns": ([0, 1, 2, 3], ((Shard(1),), COLS), ((6, 132), (40, 140)), {}),
    "stripes": (PAIR, STRIPES, EVEN, {}),
    "rows and columns": ([[3, 1], [0, 2]], ((Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)]), EVEN, {}),
    "experts": ([0, 1, 2, 3], ((Shard(0),), ROWS), ((6, 64, 32), (3, 8, 40)), {}),
    "hsdp": (PAIR, ((Replicate(), Shard(0)), [(Axis(2, 0), 1)]), UNEVEN, {"share": False}),
    "hsdp, shared": (PAIR, ((Replicate(), Shard(0)), [(Axis(2, 0), 1)]), UNEVEN, {"share": True, "bucket_bytes": 4096}),
}


def unsharded(shapes):
    ps, _ = placed(shapes, [None] * len(shapes))
    train(groups(ps, WIRES), ps)
    return ps


def every_mesh():
    for kind, (ranks, (placements, axes), shapes, options) in CASES.items():
        shapes = shapes * len(WIRES)
        ps, cuts = placed(shapes, [(DeviceMesh("cpu", ranks), placements, axes)] * len(shapes))
        optimizer = groups(ps, WIRES)
        optimizer.answers.planner = partial(plan, **options)
        train(optimizer, ps, cuts)
        for p, cut, whole in zip(ps, cuts, unsharded(shapes)):
            assert bits(local(p)).equal(bits(cut.cut(whole.data))), (kind, tuple(p.shape))


def two_meshes_in_turn():
    """Dense matrices, experts and plain ones, in buckets of one matrix each."""
    shapes = ((70, 130), (4, 32, 48), (12, 40)) * len(WIRES)
    dense = DeviceMesh("cpu", [0, 1, 2, 3]), (Shard(0),), ROWS
    experts = DeviceMesh("cpu", PAIR), (Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)]
    ps, cuts = placed(shapes, [dense, experts, None] * len(WIRES))
    optimizer = groups(ps, WIRES)
    optimizer.answers.planner = partial(plan, bucket_bytes=1)
    train(optimizer, ps, cuts)
    for p, cut, whole in zip(ps, cuts, unsharded(shapes)):
        assert bits(local(p)).equal(bits(cut.cut(whole.data))), tuple(p.shape)


def small_sums():
    """Gram form beside whole matrices, in the same round."""
    shapes, results = ((256, 16), (16, 256), (70, 13)), []
    work = Gram(restarts=(), min_aspect=1.0)
    for place in (None, (DeviceMesh("cpu", [0, 1, 2, 3]), (Shard(0),), ROWS)):
        ps, cuts = placed(shapes, [place] * 3)
        recipes = [Recipe(Asker(work=work, mode=mode)) for mode in ("gram", "full", "gram")]
        train(ShardedOptimizer([{"params": [p], "recipe": r} for p, r in zip(ps, recipes)]), ps, cuts)
        results.append([local(p) for p in ps])
    for cut, whole, ours in zip(cuts, *results):
        assert (cut.cut(whole) - ours).norm() <= 1e-4 * whole.norm()


def whole_matrices(rank, world_size, folder):
    every_mesh()
    two_meshes_in_turn()
    small_sums()


@pytest.mark.multigpu
def test_four_ranks_equal_one_device(tmp_path):
    """Kills: positions taken for ranks of a group, splits that do not add up, messages of buckets that overtake."""
    run_processes(RANKS, whole_matrices, tmp_path)
