"""Real DTensors on every kind of mesh (ranks as threads): the unsharded step, parameters and every stored part.
Kills, in `shardopt/dtensor/`: an answer that is not reduced, reduced over the replicas too, or over the wrong dim;
`Geometry.whole` of the local shard; noise keyed by the local row; a `_StridedShard` read as a Shard or not at all.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

import shardopt
from shardopt.state import part_specs
from tests.table import FLIPS, UNSHARDED, gradients, weights
from tests.threaded import run_threaded
from tests.virtual import Axis, Rank, bits

STEPS = 3
UNEVEN = ((7, 15), (2, 16), (1, 1), (7,), (70, 130), (66, 9, 3, 3), (4, 32, 48))
EVEN = ((8, 16), (64, 128), (36, 256), (128, 1024))
EXPERTS = ((4, 32, 48), (6, 64, 32))


class Case(NamedTuple):
    """A kind of mesh: its sizes, the shapes on it, how a parameter gets there, and the cut in cutting order.

    axes(shape): (virtual Axis, mesh axis) pairs, in the order in which they cut.
    """

    sizes: tuple[int, ...]
    shapes: tuple[tuple[int, ...], ...]
    place: Callable[[nn.ParameterList, Any], Any]
    axes: Callable[[tuple[int, ...]], list[tuple[Axis, int]]]


def by_fsdp(model, mesh):
    fully_shard(model, mesh=mesh)


def by_hand(*placements):
    """from_local of this rank's piece, as parallelize_module and expert parallelism make it."""

    def place(model, mesh):
        for i, p in enumerate(model):
            axes = tuple(Axis(mesh.size(k), getattr(s, "dim", None)) for k, s in enumerate(placements))
            rank = Rank(tuple(p.shape), axes, tuple(mesh.get_coordinate()))
            model[i] = nn.Parameter(distributed(rank.cut(p.data), p.shape, mesh, placements))

    return place


def fsdp_over_tp(dim):
    """TP Shard(dim) first, then fully_shard over the other axis: rows get a _StridedShard."""

    def place(model, mesh):
        by_hand(Shard(dim))(model, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])

    return place


def distributed(local, shape, mesh, placements):
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=stride)


CASES = {
    "fsdp 3": Case((3,), UNEVEN, by_fsdp, lambda s: [(Axis(3, 0), 0)]),
    "fsdp 4": Case((4,), UNEVEN, by_fsdp, lambda s: [(Axis(4, 0), 0)]),
    "hsdp 2x2": Case((2, 2), UNEVEN, by_fsdp, lambda s: [(Axis(2, None), 0), (Axis(2, 0), 1)]),
    "tp rows": Case((3,), UNEVEN, by_hand(Shard(0)), lambda s: [(Axis(3, 0), 0)]),
    "tp cols": Case((4,), EVEN, by_hand(Shard(1)), lambda s: [(Axis(4, 1), 0)]),
    "tp rows, fsdp": Case((2, 2), EVEN, fsdp_over_tp(0), lambda s: [(Axis(2, 0), 1), (Axis(2, 0), 0)]),
    "tp cols, fsdp": Case((2, 2), EVEN, fsdp_over_tp(1), lambda s: [(Axis(2, 0), 0), (Axis(2, 1), 1)]),
    "experts": Case((3,), EXPERTS, by_hand(Shard(0)), lambda s: [(Axis(3, 0), 0)]),
    "expert rows": Case((2,), EXPERTS, by_hand(Shard(1)), lambda s: [(Axis(2, 1), 0)]),
    "ep x fsdp": Case((2, 2), EXPERTS, by_hand(Shard(0), Shard(1)), lambda s: [(Axis(2, 0), 0), (Axis(2, 1), 1)]),
    "replicated": Case((2,), UNEVEN, by_hand(Replicate()), lambda s: [(Axis(2, None), 0)]),
}

OPTIMIZERS = {
    "adamw int8": lambda p: shardopt.AdamW(p, lr=0.01, rounding="stochastic"),
    "adamw all": lambda p: shardopt.AdamW(
        p, lr=0.01, state={"exp_avg": "int4", "exp_avg_sq": "log4"}, rounding="kahan",
        addons=["clip_by_global_norm", "gradient_centralization", "orthograd", "cautious", "cautious_decay"],
    ),
    "lion": lambda p: shardopt.Lion(p, lr=0.01, state="sqrt8", addons=["cautious"], nonfinite="skip",
                                    rounding="stochastic"),
    "rmsprop": lambda p: shardopt.RMSprop(p, state={"signed": "fp8", "non_negative": "root4"}, momentum=0.5,
                                          centered=True, addons=["rms_clip"]),
    "adafactor": lambda p: shardopt.Adafactor(p, beta1=0.8, state={"exp_avg": "int8", "exp_avg_sq": "factored"},
                                              update_from="stored"),
    "adafactor raw": lambda p: shardopt.Adafactor(p, beta1=0.8, momentum="raw", rounding="stochastic"),
    "sgd": lambda p: shardopt.SGD(p, lr=0.1, momentum=0.9, dampening=0.2, state="bf16", addons=["decay", "orthograd"]),
}  # fmt: skip


def train(optimizer, ps, cut=lambda i, g: g):
    """Steps on the same gradients everywhere. cut(i, g): the i-th parameter's gradient on this rank."""
    every = [list(gradients(tuple(p.shape), STEPS, seed=20 + i)) for i, p in enumerate(ps)]
    for step in range(STEPS):
        for i, p in enumerate(ps):
            p.grad = cut(i, every[i][step].to(p.dtype))
        optimizer.step()


def build(shapes, dtype):
    return nn.ParameterList([weights(shape, dtype, seed=i) for i, shape in enumerate(shapes)])


def on_mesh(case, build_optimizer, dtype, check=None):
    """fn(rank) for run_threaded: local parameters and state with what was cut where, and the counters."""

    def body(_):
        mesh = init_device_mesh("cpu", case.sizes, mesh_dim_names=("dp", "tp")[: len(case.sizes)])
        model = build(case.shapes, dtype)
        case.place(model, mesh)
        ps = list(model)
        cuts = []
        for p in ps:
            pairs = case.axes(tuple(p.shape))
            here = mesh.get_coordinate()
            cuts.append(Rank(tuple(p.shape), tuple(a for a, _ in pairs), tuple(here[k] for _, k in pairs)))
        optimizer = build_optimizer(ps)

        def cut(i, g):
            return distributed(cuts[i].cut(g), g.shape, ps[i].device_mesh, ps[i].placements)

        train(optimizer, ps, cut)
        found = []
        for p, rank in zip(ps, cuts):
            assert optimizer.layout(p).geo == rank.geo
            state = {name: getattr(x, "_local_tensor", x) for name, x in optimizer.state[p].items()}
            specs = part_specs(optimizer.plan(optimizer.recipes[0], p).codecs, rank)
            found.append((p._local_tensor.detach(), state, rank, specs))
        return found, (optimizer.answers.rounds, optimizer.answers.collectives), optimizer.skipped_steps

    return body


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("kind", CASES)
def test_equals_the_unsharded_step(kind, name):
    case, dtype = CASES[kind], torch.bfloat16 if name != "sgd" else torch.float32
    whole = build(case.shapes, dtype)
    optimizer = OPTIMIZERS[name](list(whole))
    train(optimizer, list(whole))
    different = total = 0
    for found, _, _ in run_threaded(math.prod(case.sizes), on_mesh(case, OPTIMIZERS[name], dtype)):
        for p, (local, state, rank, specs) in zip(whole, found):
            expected = {"p": rank.cut(p.data)}
            for part, value in optimizer.state[p].items():
                expected[part] = piece(value, rank.entries(specs[part])) if part in specs else value
            assert set(state) == set(expected) - {"p"}
            for part, value in {"p": local, **state}.items():
                assert value.shape == expected[part].shape and value.dtype == expected[part].dtype, part
                different += close(part, value, expected[part])
                total += value.numel()
    assert different <= max(1, FLIPS * total)


def piece(whole, entries):
    for dim, line in enumerate(entries):
        whole = whole.index_select(dim, line)
    return whole


def close(name, a, b):
    """How many values differ: at most by a code, or 1e-6 of the norm in fp32."""
    if a.dtype == torch.float32:
        assert (a - b).norm() <= UNSHARDED * b.norm(), name
        return 0
    different = bits(a) != bits(b)
    assert ((bits(a)[different].int() - bits(b)[different].int()).abs() <= 1).all(), name
    return int(different.sum())


COUNTS = {  # collectives a step on a mesh that cuts rows
    "adamw": (lambda p: shardopt.AdamW(p, state="int8"), 0),
    "lion": (lambda p: shardopt.Lion(p), 0),
    "adamw skip": (lambda p: shardopt.AdamW(p, nonfinite="skip"), 1),
    "adamw clip": (lambda p: shardopt.AdamW(p, addons=["clip_by_global_norm"]), 1),
    "adamw cautious": (lambda p: shardopt.AdamW(p, addons=["cautious"]), 1),
    "adafactor": (lambda p: shardopt.Adafactor(p), 2),
    "adafactor raw": (lambda p: shardopt.Adafactor(p, beta1=0.9, momentum="raw"), 2),
}


@pytest.mark.parametrize("name, count", [*product(COUNTS, (1, 50)), ("adafactor", 1000)])
def test_collectives_a_step(name, count):
    """As many for 50 or 1,000 parameters as for one. Kills: a collective a parameter."""
    make, expected = COUNTS[name]

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        model = build(((4, 3),) * count, torch.float32)
        by_hand(Shard(0))(model, mesh)
        ps = list(model)
        optimizer = make(ps)
        for p in ps:
            p.grad = distributed(torch.ones_like(p._local_tensor), p.shape, mesh, p.placements)
        optimizer.step()
        return optimizer.answers.rounds, optimizer.answers.collectives

    assert run_threaded(2, body) == [(expected, expected)] * 2


def test_several_meshes_in_one_group():
    """Dense parameters on one mesh, experts on another, plain ones on none: one norm over all, the unsharded step."""
    shapes = ((70, 130), (4, 32, 48), (7,))

    def make(ps):
        return shardopt.Adafactor(ps, addons=["clip_by_global_norm"], nonfinite="skip")

    whole = build(shapes, torch.float32)
    train(make(list(whole)), list(whole))

    def body(_):
        dense, experts = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (2, 2))
        model = build(shapes, torch.float32)
        places = [(dense, (Shard(0),)), (experts, (Shard(0), Shard(1))), None]
        cuts = []
        for i, place in enumerate(places):
            if place is None:
                cuts.append(Rank(shapes[i], (), ()))
                continue
            mesh, placements = place
            axes = tuple(Axis(mesh.size(k), s.dim) for k, s in enumerate(placements))
            cuts.append(Rank(shapes[i], axes, tuple(mesh.get_coordinate())))
            model[i] = nn.Parameter(distributed(cuts[i].cut(model[i].data), shapes[i], mesh, placements))
        ps = list(model)
        train(make(ps), ps, lambda i, g: distributed(cuts[i].cut(g), g.shape, *places[i]) if places[i] else g)
        return [(rank, getattr(p, "_local_tensor", p).detach()) for rank, p in zip(cuts, ps)]

    for found in run_threaded(4, body):
        for p, (rank, local) in zip(whole, found):
            assert (rank.cut(p.data) - local).norm() <= UNSHARDED * local.norm()


def test_one_nan_is_skipped_on_every_rank():
    """P14, P27: a NaN on one rank, and on one only. Kills: a flag that is not reduced."""

    def body(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        local = torch.ones(1, 3)
        p = nn.Parameter(distributed(local.clone(), (2, 3), mesh, (Replicate(), Shard(0))))
        optimizer = shardopt.AdamW([p], nonfinite="skip")
        for bad in (True, False):
            g = torch.full((1, 3), math.nan if bad and rank == 3 else 1.0)
            p.grad = distributed(g, (2, 3), mesh, (Replicate(), Shard(0)))
            optimizer.step()
            assert p._local_tensor.equal(local) == bad
        return optimizer.skipped_steps

    assert run_threaded(4, body) == [1] * 4


def test_what_cannot_be_stepped_is_refused_with_words():
    """A Partial gradient or parameter, a gradient placed elsewhere, a byte on two ranks, a shard on an inner dim."""

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        p = nn.Parameter(distributed(torch.ones(2, 4), (4, 4), mesh, (Shard(0),)))
        optimizer = shardopt.AdamW([p])
        for placements, words in (((Partial(),), "reduce it"), ((Shard(1),), "redistribute it")):
            local = torch.ones(4, 4) if placements[0].is_partial() else torch.ones(4, 2)
            p.grad = None
            p.grad = distributed(local, (4, 4), mesh, placements)
            with pytest.raises(ValueError, match=words):
                optimizer.step()
        for shape, placement, state, words in (
            ((4, 4), Partial(), "int8", "Shard and Replicate only"),
            ((64, 66), Shard(1), "int4", "a byte would lie on two ranks"),
            ((64, 4, 3, 3), Shard(2), "int8", "Shard dim 0"),
        ):
            cut = [-(-n // 2) if getattr(placement, "dim", None) == d else n for d, n in enumerate(shape)]
            q = nn.Parameter(distributed(torch.ones(cut), shape, mesh, (placement,)))
            with pytest.raises(ValueError, match=words):
                len(shardopt.AdamW([q], state=state).state)

    run_threaded(2, body)


def test_rows_that_do_not_divide_under_tp_and_fsdp_are_refused_on_all_ranks():
    """The real local tensors then differ from what the spec says, on some ranks only: P24, contracts.md section 2."""

    def body(_):
        mesh = init_device_mesh("cpu", (3, 2), mesh_dim_names=("dp", "tp"))
        model = build(((7, 8),), torch.float32)
        fsdp_over_tp(0)(model, mesh)
        with pytest.raises(ValueError, match="not a multiple of the 2 tensor-parallel ranks"):
            len(shardopt.AdamW(list(model)).state)

    run_threaded(6, body)
