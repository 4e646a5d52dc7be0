"""Whole matrices on every kind of mesh (ranks as threads): bitwise the step of one device, whatever the wire."""

import math
import re
from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.placement_types import _StridedShard

from shardopt import Recipe, ShardedOptimizer
from shardopt.dtensor.plan import plan
from tests.table import gradients, weights
from tests.threaded import run_threaded
from tests.virtual import Axis, Run, bits
from tests.whole_kit import WIRES, Asker, Mix, groups, local, placed, train

UNEVEN = ((7, 15), (2, 16), (1, 1), (70, 130), (66, 9, 3, 3), (4, 32, 48), (7,))
ODD = ((6, 66), (40, 70), (12, 258), (3, 40))
EVEN = ((8, 16), (64, 128), (36, 258), (4, 32, 48))
EXPERTS = ((4, 32, 48), (6, 64, 32), (7, 8, 40))
STRIPES = _StridedShard(0, split_factor=2)


class Case(NamedTuple):
    """ranks: as the mesh numbers them. axes: (virtual Axis, mesh axis) in cutting order. options: of the planner."""

    ranks: Any
    placements: tuple[Any, ...]
    axes: list[tuple[Axis, int]]
    shapes: tuple[tuple[int, ...], ...]
    options: Mapping[str, Any] = MappingProxyType({})


def rows(n):
    return [(Axis(n, 0), 0)]


CASES = {
    "rows, one empty": Case([0, 1, 2], (Shard(0),), rows(3), UNEVEN),
    "more ranks than rows": Case([0, 1, 2, 3, 4], (Shard(0),), rows(5), UNEVEN, {"bucket_bytes": 4096}),
    "odd columns": Case([0, 1], (Shard(1),), [(Axis(2, 1), 0)], ODD),
    "columns of a stack": Case([0, 1], (Shard(2),), [(Axis(2, 2), 0)], ((4, 8, 66), (3, 33, 32)), {"bucket_bytes": 1}),
    "stripes": Case([[0, 1], [2, 3], [4, 5]], (STRIPES, Shard(0)), [(Axis(2, 0), 1), (Axis(3, 0), 0)], EVEN[:3]),
    "rows and columns": Case([[0, 1], [2, 3]], (Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)], EVEN),
    "mixed order": Case([[3, 1], [0, 2]], (Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)], EVEN),
    "one axis, mixed": Case([2, 0, 1], (Shard(0),), rows(3), UNEVEN),
    "experts": Case([0, 1, 2], (Shard(0),), rows(3), EXPERTS),
    "expert rows": Case([[0, 1], [2, 3]], (Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)], EXPERTS[:2]),
    "expert stripes": Case([[0, 1], [2, 3]], (STRIPES, Shard(0)), [(Axis(2, 0), 1), (Axis(2, 0), 0)], EXPERTS[:2]),
    "hsdp": Case([[0, 1], [2, 3]], (Replicate(), Shard(0)), [(Axis(2, 0), 1)], UNEVEN, {"share": False}),
    "hsdp, shared": Case([[0, 1], [2, 3]], (Replicate(), Shard(0)), [(Axis(2, 0), 1)], UNEVEN, {"share": True}),
    "hsdp, small buckets": Case(
        [[0, 3], [2, 1]], (Shard(0), Replicate()), rows(2), UNEVEN, {"share": True, "bucket_bytes": 20_000}
    ),
    "hsdp, tp": Case(
        [[[0, 1], [2, 3]], [[4, 5], [6, 7]]],
        (Replicate(), Shard(0), Shard(1)),
        [(Axis(2, 0), 1), (Axis(2, 1), 2)],
        EVEN,
        {"share": True},
    ),
    "experts, shared": Case([[0, 1], [2, 3]], (Replicate(), Shard(0)), [(Axis(2, 0), 1)], EXPERTS, {"share": True}),
    "replicas": Case([[0, 1], [2, 3]], (Replicate(), Replicate()), [], UNEVEN, {"share": True}),
}


@pytest.mark.parametrize("kind", CASES)
def test_equals_one_device(kind):
    """Every wire at once, as groups of one optimizer.

    Kills: blocks counted on the local shard; maxima that are not asked; own pieces that skip the wire; nibbles of odd
    columns left in their bytes; positions taken for ranks of the group; a replica's results given to another matrix;
    a stripe's rows laid end to end.
    """
    case = CASES[kind]
    shapes = case.shapes * len(WIRES)
    whole, _ = placed(shapes, [None] * len(shapes))
    train(groups(whole), whole)

    def body(_):
        mesh = DeviceMesh("cpu", case.ranks)
        ps, cuts = placed(shapes, [(mesh, case.placements, case.axes)] * len(shapes))
        optimizer = groups(ps)
        optimizer.answers.planner = partial(plan, **case.options)
        train(optimizer, ps, cuts)
        for i, (p, cut) in enumerate(zip(ps, cuts)):
            assert bits(local(p)).equal(bits(cut.cut(whole[i].data))), (shapes[i], WIRES[i // len(case.shapes)])

    run_threaded(torch.tensor(case.ranks).numel(), body)


@pytest.mark.parametrize("wire", WIRES, ids="+".join)
def test_one_device_is_the_definition(wire):
    """One device, and the assembled matrices of virtual ranks, whose answer is written apart.

    Kills: a wire that one device leaves out; work on the piece; a format used twice.
    """
    recipe = Recipe(Asker(there=wire[0], back=wire[1]))
    for i, shape in enumerate(((7, 15), (70, 130), (5, 3, 40), (66, 9, 3, 3))):
        (p,), _ = placed([shape], [None])
        start = p.data.clone()
        train(groups([p], [wire]), [p])
        for mesh in ((), (Axis(3, 0),), (Axis(2, 0), Axis(2, None))):
            run = Run(recipe, recipe.defaults(), start, mesh)
            for g in gradients(shape, 2, seed=20):
                run.step(g)
            assert bits(run.parameter()).equal(bits(p.data)), (i, mesh)


def test_several_meshes_and_none():
    """Dense matrices on one mesh, experts on another, plain ones on none, vectors between them."""
    shapes = ((70, 130), (4, 32, 48), (12, 40), (7,), (33, 64), (9,), (6, 32, 40))

    def places(dense, experts):
        flat, deep = (dense, (Shard(0),), rows(4)), (experts, (Shard(0), Shard(1)), [(Axis(2, 0), 0), (Axis(2, 1), 1)])
        return [flat, deep, None, flat, flat, None, deep]

    def make(ps):
        return groups(ps, [("int8", "int4")])

    whole, _ = placed(shapes, [None] * len(shapes))
    train(make(whole), whole)

    def body(_):
        ps, cuts = placed(shapes, places(DeviceMesh("cpu", [0, 1, 2, 3]), DeviceMesh("cpu", [[0, 1], [2, 3]])))
        optimizer = make(ps)
        train(optimizer, ps, cuts)
        assert all(bits(local(p)).equal(bits(cut.cut(w.data))) for p, cut, w in zip(ps, cuts, whole))

    run_threaded(4, body)


@pytest.mark.parametrize("options", [{"bucket_bytes": 1}, {}], ids=["bucket each", "one bucket"])
def test_other_asks_in_the_same_round(options):
    """Norms beside and after the matrix, and members that ask for theirs a round later than others (OrthoGrad first).

    Kills: answers in another order than the asks; a route of all members of a bucket where few of them ask.
    """
    shapes = ((7, 15), (70, 130), (4, 32, 48), (66, 9, 3, 3), (9,))

    def make(ps):
        mine = Asker(there="int8", back="int8", beside=True)
        recipes = Recipe(mine), Recipe(mine, "fp32", ("orthograd",))
        optimizer = ShardedOptimizer([{"params": ps[i::2], "recipe": recipe} for i, recipe in enumerate(recipes)])
        optimizer.answers.planner = partial(plan, **options)
        return optimizer

    whole, _ = placed(shapes * 2, [None] * 10)
    train(make(whole), whole)

    def body(_):
        mesh = DeviceMesh("cpu", [[0, 1], [2, 3]])
        place = mesh, (Replicate(), Shard(0)), [(Axis(2, 0), 1)]
        ps, cuts = placed(shapes * 2, [place] * 10)
        train(make(ps), ps, cuts)
        return [(local(p), cut.cut(w.data)) for p, cut, w in zip(ps, cuts, whole)]

    for found in run_threaded(4, body):
        for ours, expected in found:
            assert (ours - expected).norm() <= 1e-5 * expected.norm()  # int8 codes may flip by the norms' last bit


@pytest.mark.parametrize("wire", WIRES, ids="+".join)
def test_nan_and_inf_fill_their_matrix_only(wire):
    """One bad element on one rank: its matrix is NaN on all, every other matrix is what it is without it.

    Kills: an infinity that a block's scale swallows; a NaN that reaches the neighbours in a stack or in the message.
    """
    shapes = ((7, 40), (5, 40), (4, 32, 48), (70, 130))
    good, _ = placed(shapes, [None] * 4)
    train(groups(good, [wire]), good, steps=1)

    def spoil(i, g):
        g = g.clone()
        if i in (0, 2, 3):
            g.flatten()[-1 if i == 2 else 3] = {0: math.nan, 2: math.inf, 3: -math.inf}[i]
        return g

    def body(_):
        place = DeviceMesh("cpu", [0, 1, 2]), (Shard(0),), rows(3)
        ps, cuts = placed(shapes, [place] * 4)
        train(groups(ps, [wire]), ps, cuts, steps=1, change=spoil)
        for p in (ps[0], ps[3]):
            assert local(p).isnan().all()
        assert bits(local(ps[1])).equal(bits(cuts[1].cut(good[1].data)))
        experts, expected = local(ps[2]), cuts[2].cut(good[2].data)
        for k, expert in enumerate(cuts[2].held[0].tolist()):
            assert experts[k].isnan().all() if expert == 3 else bits(experts[k]).equal(bits(expected[k]))

    run_threaded(3, body)


def test_matrices_of_no_elements():
    def body(_):
        place = DeviceMesh("cpu", [0, 1]), (Shard(0),), rows(2)
        ps, cuts = placed(((0, 8), (5, 8), (0, 4, 32)), [place] * 3)
        train(groups(ps, [("int8", "int8")]), ps, cuts)
        assert local(ps[1]).isfinite().all()

    run_threaded(2, body)


def test_a_format_that_cannot_travel_is_refused():
    """Stochastic rounding, non-negative formats and projections: the meshes' bits would differ."""
    for spec in ("log8", "factored", "bf16(rounding='stochastic')", "root4"):
        p = nn.Parameter(weights((8, 32)))
        p.grad = torch.ones(8, 32)
        with pytest.raises(ValueError, match="cannot be sent"):
            groups([p], [("fp32", spec)]).step()


def test_different_plans_are_refused_on_every_rank():
    """Another work, format or order on one rank only; both plans are named, the same on all ranks.

    Kills: a digest that nobody compares, or of less than all; ranks that wait for ever.
    """
    odd = {"work": {"work": Mix(scale=2.0)}, "format": {"there": "bf16"}, "order": {}}

    def body(rank):
        place = DeviceMesh("cpu", [0, 1, 2]), (Shard(0),), rows(3)
        named = []
        for kind, options in odd.items():
            ps, cuts = placed(((6, 8), (9, 8)), [place] * 2)
            if rank == 1 and kind == "order":
                ps, cuts = ps[::-1], cuts[::-1]
            optimizer = ShardedOptimizer(ps, Recipe(Asker(**(options if rank == 1 else {}))))
            with pytest.raises(ValueError, match="different plans") as error:
                train(optimizer, ps, cuts, steps=1)
            named.append(re.findall(r"[0-9a-f]{14}", str(error.value))[:2])
            assert len(set(named[-1])) == 2
        return named

    results = run_threaded(3, body)
    assert results[0] == results[1] == results[2]


def test_the_first_difference_is_told():
    """Kills: a difference of counts told as one of options, the other rank's words."""

    def body(rank):
        place = DeviceMesh("cpu", [0, 1]), (Shard(0),), rows(2)
        words = []
        for fewer in (True, False):
            ps, cuts = placed(((6, 8),) * 6, [place] * 6)
            optimizer = ShardedOptimizer(ps, Recipe(Asker()))
            if rank == 1 and fewer:
                ps, cuts = ps[:2], cuts[:2]
            elif rank == 1:
                optimizer.answers.planner = partial(plan, bucket_bytes=1)
            with pytest.raises(ValueError, match="different plans") as error:
                train(optimizer, ps, cuts, steps=1)
            words.append(str(error.value))
        return words

    for rank, (fewer, other) in enumerate(run_threaded(2, body)):
        assert "some have 2 matrices with gradients, some 6" in fewer
        assert ("number 2 is" in fewer, "is the last" in fewer) == (rank == 0, rank == 1)
        assert "of the same parameters, by planners with other options" in other
