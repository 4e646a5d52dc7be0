"""Errors about a parameter name it: by the name that the optimizer was given, else by its place, and by its shape."""

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Shard

import shardopt
from shardopt import Recipe, ShardedOptimizer
from shardopt.dtensor.layout import layout_of
from shardopt.dtensor.plan import plan
from shardopt.dtensor.task import formats_of, member_of
from shardopt.polar import NewtonSchulz
from shardopt.rules.muon import WIRES, Muon
from tests.table import weights
from tests.test_mesh import distributed
from tests.threaded import run_threaded
from tests.whole_kit import Asker, Mix

SHAPES = {"wq.weight": (6, 32), "wk.weight": (9, 8), "wv.weight": (9, 8)}


def named(mesh, shapes=SHAPES):
    """(name, parameter with a gradient of ones), cut along the rows over the mesh."""
    found = []
    for name, shape in shapes.items():
        local = weights(shape).tensor_split(mesh.size(), 0)[mesh.get_local_rank()]
        p = nn.Parameter(distributed(local, shape, mesh, (Shard(0),)))
        p.grad = torch.ones_like(p)
        found.append((name, p))
    return found


def refused(change, shapes=SHAPES):
    """Per rank the error of a step in which rank 1's optimizer is another: change(pairs, options) there."""

    def body(rank):
        pairs, options = named(init_device_mesh("cpu", (3,)), shapes), [{}, {}, {}]
        if rank == 1:
            change(pairs, options)
        groups = [{"params": [pair], "recipe": Recipe(Asker(**more))} for pair, more in zip(pairs, options)]
        with pytest.raises(ValueError, match="different plans") as error:
            ShardedOptimizer(groups).step()
        return str(error.value).splitlines()[0]

    return run_threaded(3, body)


@pytest.mark.parametrize(
    "what",
    [{"work": Mix(scale=2.0)}, {"there": "bf16"}, {"back": "int8"}, {"mode": "local"}],
    ids=lambda x: next(iter(x)),
)
def test_plans_that_differ_name_the_first_parameter(what):
    """Kills: a number without a name, the last difference, one that only the rank itself knows of."""
    for text in refused(lambda _, options: options[1].update(what) or options[2].update(what)):
        assert "they differ first in number 1, here wk.weight of shape (9, 8)" in text


def test_a_parameter_that_is_missing_somewhere():
    """Every rank says what it has in that place. Kills: ranks that compare lists of unequal length for ever."""

    def without(which):
        def change(pairs, _):
            pairs[which][1].grad = None

        return change

    texts = refused(without(0))
    assert ["here wk.weight" in text for text in texts] == [False, True, False]
    assert sum("differ first in number 0, here wq.weight" in text for text in texts) == 2
    texts = refused(without(2))
    assert all("some have 2 matrices with gradients, some 3" in text for text in texts)
    assert ["here number 2 is wv.weight" in text for text in texts] == [True, False, True]
    assert "here wk.weight" in texts[1] and "is the last" in texts[1]


def test_planners_with_other_options():
    """Kills: a parameter blamed for what all of them share."""

    def body(rank):
        opt = shardopt.Muon(named(init_device_mesh("cpu", (2,)), {f"layer.{i}": (64, 32) for i in range(6)}))
        opt.answers.planner = lambda *given, **more: plan(*given, **more, bucket_bytes=1 if rank else None)
        with pytest.raises(ValueError, match="of the same parameters, by planners with other options"):
            opt.step()

    run_threaded(2, body)


def test_a_plan_names_its_members():
    """In its table and in its errors, but not in its digest. Kills: names that ranks must agree on."""
    layouts = [layout_of(torch.ones(8, 32), name) for name in ("a.weight", "b.weight", "")]
    wire = WIRES["bf16"]
    members = [member_of(x, NewtonSchulz(), *formats_of(x, wire)) for x in layouts]
    found = [plan([member], 1) for member in members]
    assert "a.weight" in found[0].describe() and "member 0" in found[2].describe()
    assert found[0].digest() == found[1].digest() == found[2].digest() and found[0] == found[1]
    with pytest.raises(ValueError, match=r"mode 'gram' of a\.weight \(8x32"):
        plan(members, 2, modes="gram")
    with pytest.raises(ValueError, match=r"the mode of b\.weight is 'ful'; .* did you mean 'full'"):
        plan(members, 2, modes=["full", "ful", "full"])


def test_placements_that_do_not_fit_name_the_parameter():
    """By name where there is one, else by group and place. Kills: "a parameter of shape"."""

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        (_, p), (_, q) = named(mesh, {"a": (4, 8), "b": (4, 8)})
        wrong = nn.Parameter(distributed(torch.ones(4, 8), (4, 8), mesh, (Partial(),)))
        for params, what in (
            ([("a", p), ("b", wrong)], r"b of shape \(4, 8\) has placements"),
            (
                [{"params": [p]}, {"params": [q, wrong]}],
                r"param_groups\[1\]\.params\[1\] of shape \(4, 8\) has placements",
            ),
        ):
            with pytest.raises(ValueError, match=f"^{what}"):
                shardopt.AdamW(params).explain()
        ((_, packed),) = named(mesh, {"packed": (64, 66)})
        half = weights((64, 66)).tensor_split(2, 1)[mesh.get_local_rank()]
        packed = nn.Parameter(distributed(half, (64, 66), mesh, (Shard(1),)))
        with pytest.raises(ValueError, match=r"but layer\.packed of shape \(64, 66\) with placements"):
            len(shardopt.AdamW([("layer.packed", packed)], state={"exp_avg": "int4"}).state)

    run_threaded(2, body)


def test_names_follow_the_groups():
    """Kills: names kept from before a group was added, or of one that was refused."""
    p, q = (nn.Parameter(torch.ones(4)) for _ in range(2))
    opt = shardopt.AdamW([p])
    bad = nn.Parameter(torch.zeros(3, dtype=torch.int32), requires_grad=False)
    with pytest.raises(ValueError, match=r"param_groups\[1\]\.params\[0\] is torch.int32"):
        opt.add_param_group({"params": [bad]})
    with pytest.raises(ValueError, match=r"param_groups\[1\]\.params\[0\] is a vector"):
        opt.add_param_group({"params": [q], "recipe": Recipe(Muon())})
    opt.add_param_group({"params": [p.new_ones(2).requires_grad_(), q]})
    assert opt.name_of(q) == "param_groups[1].params[1]" and opt.name_of(p) == "param_groups[0].params[0]"


def test_parameters_without_a_kernel_are_named():
    """Where kernels are required. Kills: a reason that leaves the search to the user."""
    turned = [(f"layer.{i}", nn.Parameter(torch.ones(8, 4).t())) for i in range(3)]
    for _, p in turned:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match=r"not contiguous \(layer\.0 and 2 more\)\. Use fused=None"):
        shardopt.SGD(turned, fused=True).step()
