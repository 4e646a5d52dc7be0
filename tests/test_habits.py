"""What users do with torch.optim.AdamW works the same way here: groups, schedulers, closures, hooks."""

import copy
import warnings

import pytest
import torch
from torch.optim import lr_scheduler

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from tests.small import close, give, params, train
from tests.table import TORCH_FEW


def test_groups_are_kept_as_given():
    """P36. Number, order and the user's own keys; torch's keys are there with torch's names."""
    a, b, c, d = params()
    groups = [{"params": [a, b], "lr": 0.1, "mine": "x"}, {"params": [c], "betas": (0.5, 0.6)}, {"params": [d]}]
    optimizer = shardopt.AdamW(groups, lr=0.01, weight_decay=0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.1, 0.01, 0.01]
    assert [g["betas"] for g in optimizer.param_groups] == [(0.9, 0.999), (0.5, 0.6), (0.9, 0.999)]
    assert optimizer.param_groups[0]["mine"] == "x" and optimizer.param_groups[0]["params"] == [a, b]
    assert all(g["weight_decay"] == 0.2 and g["eps"] == 1e-8 for g in optimizer.param_groups)
    values = (str, int, float, bool, tuple, type(None))
    assert all(isinstance(v, values) for g in optimizer.param_groups for k, v in g.items() if k != "params")


def test_every_group_has_its_own_numbers():
    """Equal to torch with the same groups. Kills: the defaults read where the group is meant."""
    ps, qs = params(), params()

    def groups(x):
        return [{"params": x[:2], "lr": 0.1, "weight_decay": 0.0}, {"params": x[2:], "betas": (0.5, 0.6), "eps": 1e-3}]

    a = shardopt.AdamW(groups(ps), lr=0.02, weight_decay=0.3, state="fp32")
    b = torch.optim.AdamW(groups(qs), lr=0.02, weight_decay=0.3)
    train(a, ps, 5)
    train(b, qs, 5)
    assert close(ps, qs)


def test_groups_with_their_own_recipes():
    """state, addons and rounding of a group replace the optimizer's; a whole recipe may, too."""
    shapes = [(64, 64)] * 4
    ps = params(shapes, torch.bfloat16)
    optimizer = shardopt.AdamW(
        [
            {"params": [ps[0]]},
            {"params": [ps[1]], "state": {"signed": "int4"}, "addons": ["cautious", "decay"]},
            {"params": [ps[2]], "state": {"exp_avg": "fp8"}, "rounding": "stochastic"},
            {"params": [ps[3]], "recipe": Recipe(rules.Lion(lr=1e-3), "bf16"), "lr": 0.5},
        ],
        lr=0.01,
    )
    train(optimizer, ps, 2)
    names = [set(optimizer.state[p]) - {"step", "key"} for p in ps]
    assert names[0] == set(shardopt.AdamW(params(shapes)).state_dict()["state"][0]) - {"step", "key"}
    assert "exp_avg.int4" in names[1] and "exp_avg.fp8" in names[2] and names[3] == {"exp_avg.bf16"}
    assert "key" in optimizer.state[ps[2]] and optimizer.param_groups[3]["lr"] == 0.5
    keys = [g["recipe"] for g in optimizer.param_groups]
    assert keys[1].split("/")[2] == "decay,cautious" and keys[2].endswith("stochastic") and keys[3].startswith("lion")


def test_add_param_group_after_steps():
    ps, qs = params(), params()
    a, b = shardopt.AdamW(ps[:2], lr=0.1, state="fp32"), torch.optim.AdamW(qs[:2], lr=0.1)
    train(a, ps[:2], 3)
    train(b, qs[:2], 3)
    a.add_param_group({"params": ps[2:], "lr": 0.3})
    b.add_param_group({"params": qs[2:], "lr": 0.3})
    train(a, ps, 3)
    train(b, qs, 3)
    assert close(ps, qs, TORCH_FEW) and [float(a.state[p]["step"]) for p in ps] == [6, 6, 3, 3]


def test_a_refused_group_leaves_nothing_behind():
    """Kills: a group appended before it is checked."""
    optimizer = shardopt.AdamW(params())
    for bad in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int32)):
        with pytest.raises(ValueError, match="real floating-point"):
            optimizer.add_param_group({"params": [torch.nn.Parameter(bad, requires_grad=False)]})
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": [optimizer.param_groups[0]["params"][0]]})
    assert len(optimizer.param_groups) == len(optimizer.recipes) == 1
    train(optimizer, optimizer.param_groups[0]["params"], 1)


def test_named_parameters():
    """(name, tensor) pairs, as torch accepts them; errors use the names."""
    ps = params()
    optimizer = shardopt.AdamW([(f"layer.{i}", p) for i, p in enumerate(ps)])
    assert optimizer.param_groups[0]["param_names"] == [f"layer.{i}" for i in range(4)]
    ps[1].grad = torch.zeros(64, 96).to_sparse()
    with pytest.raises(ValueError, match=r"layer\.1 is sparse"):
        optimizer.step()


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, [lambda t: 0.9**t, lambda t: 1 / (1 + t)]),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.1, 0.2], total_steps=10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, T_max=6),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, 0.1, total_iters=3), lr_scheduler.StepLR(o, 2)], [3]
    ),
}


@pytest.mark.parametrize("tensor", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers(name, tensor):
    """Equal to torch under the same schedule, lr (and betas) changing every step, lr a number or a 0-d tensor."""
    ps, qs = params(), params()
    lr = torch.tensor(0.05) if tensor else 0.05
    a = shardopt.AdamW([{"params": ps[:2]}, {"params": ps[2:]}], lr=copy.deepcopy(lr), state="fp32")
    b = torch.optim.AdamW([{"params": qs[:2]}, {"params": qs[2:]}], lr=copy.deepcopy(lr), foreach=False)
    schedules = [SCHEDULERS[name](o) for o in (a, b)]
    for i in range(8):
        for optimizer, x, schedule in zip((a, b), (ps, qs), schedules):
            give(x, i)
            optimizer.step()
            schedule.step()
    assert close(ps, qs) and [float(g["lr"]) for g in a.param_groups] == [float(g["lr"]) for g in b.param_groups]


def test_closure():
    """P16. Evaluated with grad enabled, on the first step too; its loss comes back."""
    (p,) = params([(3,)])
    optimizer = shardopt.AdamW([p], lr=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        calls.append(loss.item())
        return loss

    assert float(optimizer.step(closure)) == calls[0]
    assert float(optimizer.step(closure=closure)) == calls[1] < calls[0]


@pytest.mark.parametrize("to_none", [True, False])
def test_zero_grad(to_none):
    """A gradient of zeros still steps (decay, momentum), a missing one does not, as in torch."""
    ps, qs = params(), params()
    a, b = shardopt.AdamW(ps, lr=0.1, state="fp32", weight_decay=0.1), torch.optim.AdamW(qs, lr=0.1, weight_decay=0.1)
    for optimizer, x in ((a, ps), (b, qs)):
        train(optimizer, x, 2)
        optimizer.zero_grad(set_to_none=to_none)
        assert all((p.grad is None) == to_none for p in x)
        optimizer.step()
    assert close(ps, qs) and float(a.state[ps[0]]["step"]) == (2 if to_none else 3)


def test_hooks():
    seen = []
    ps = params()
    optimizer = shardopt.AdamW(ps)
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.register_state_dict_post_hook(lambda o, d: seen.append("saved"))
    optimizer.register_load_state_dict_pre_hook(lambda o, d: seen.append("loading"))
    optimizer.register_load_state_dict_post_hook(lambda o: seen.append("loaded"))
    train(optimizer, ps, 1)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["before", "after", "saved", "loading", "loaded"]


BAD = {
    "lr": (lambda p: shardopt.AdamW(p, lr=-1.0), "lr is -1.0"),
    "betas": (lambda p: shardopt.AdamW(p, betas=(0.9, 1.0)), r"betas\[1\] is 1.0"),
    "one beta": (lambda p: shardopt.AdamW(p, betas=(0.9,)), "2 numbers"),
    "group lr": (lambda p: shardopt.AdamW([{"params": p, "lr": -2.0}]), "lr is -2.0"),
    "weight_decay": (lambda p: shardopt.AdamW(p, weight_decay=-0.1), "weight_decay is -0.1"),
    "amsgrad": (lambda p: shardopt.AdamW(p, amsgrad=True), "amsgrad"),
    "differentiable": (lambda p: shardopt.AdamW(p, differentiable=True), "differentiable"),
    "fused": (
        lambda p: shardopt.AdamW(p, addons=[type("Own", (shardopt.Mars,), {})()], fused=True),
        "fused=True, but add-on mars has no",
    ),
    "nonfinite": (lambda p: shardopt.AdamW(p, nonfinite="ignore"), "propagate, zero, skip"),
    "rounding": (lambda p: shardopt.AdamW(p, rounding="up"), "nearest, stochastic, kahan"),
    "update_from": (lambda p: shardopt.AdamW(p, update_from="x"), "one of fresh, stored"),
    "state": (lambda p: shardopt.AdamW(p, state="int9"), "neither a preset"),
    "slot": (lambda p: shardopt.AdamW(p, state={"z": "int8"}), "slots of AdamW are exp_avg, exp_avg_sq"),
    "codec": (lambda p: shardopt.AdamW(p, state={"exp_avg": "log8"}), "stores non-negative slots"),
    "addon": (lambda p: shardopt.AdamW(p, addons=["prudent"]), "unknown"),
    "two decays": (lambda p: shardopt.AdamW(p, addons=["decay", "cautious_decay"]), "excludes"),
    "twice": (lambda p: shardopt.AdamW(p, addons=["cautious", "cautious"]), "once"),
    "lion": (lambda p: shardopt.Lion(p, addons=["rms_clip"]), "does nothing with lion"),
    "nesterov": (lambda p: shardopt.SGD(p, nesterov=True), "nesterov needs momentum"),
    "unread": (lambda p: ShardedOptimizer(p, Recipe(rules.SGD()), weight_decay=0.1), "nothing reads weight_decay"),
    "no recipe": (lambda p: ShardedOptimizer(p), "needs a recipe"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_says_what_is_allowed(name):
    """P38. At construction, before any step."""
    build, words = BAD[name]
    with pytest.raises(ValueError, match=words):
        build(params())


def test_construction_reads_and_prints_nothing(capsys):
    """No storage is read, nothing printed; the state comes with the first look, complete."""
    ps = params()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer = shardopt.AdamW(ps)
        assert dict.__len__(optimizer.state) == 0 and len(optimizer.state) == 4
    assert capsys.readouterr() == ("", "")
