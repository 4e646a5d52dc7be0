"""Options written into a param group after it was added: numbers act, the rest is refused or said to be unread."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import shardopt
from shardopt import Recipe, ShardedOptimizer, groups, rules


def one():
    return [nn.Parameter(torch.ones(64, 64))]


def step(opt, count=1):
    for _ in range(count):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.full_like(p, 0.5)
        opt.step()
    return opt


REFUSED = [
    (shardopt.Muon, {"nesterov": False}),
    (shardopt.Muon, {"adjust_lr": "spectral"}),
    (shardopt.Muon, {"adjust_lr_fn": "match_rms_adamw"}),
    (shardopt.Muon, {"ns_steps": 7}),
    (shardopt.Muon, {"ns_coefficients": (2.0, -1.5, 0.5)}),
    (shardopt.Muon, {"eps": 1e-3}),
    (shardopt.Muon, {"orthogonalizer": "gram"}),
    (shardopt.Muon, {"split": [32, 32]}),
    (shardopt.SGD, {"nesterov": True}),
    (shardopt.AdamW, {"atan2": True}),
    (shardopt.AdamW, {"state": "int4"}),
    (shardopt.AdamW, {"addons": ["cautious"]}),
    (shardopt.AdamW, {"rounding": "stochastic"}),
    (shardopt.AdamW, {"recipe": "lion"}),
]


@pytest.mark.parametrize("make, written", REFUSED, ids=lambda x: next(iter(x)) if isinstance(x, dict) else x.__name__)
def test_an_option_that_the_recipe_has_settled_is_refused(make, written):
    """In the next step and by explain, before anything moves; put back, or as it is, it is fine.

    Kills: each kind of option left out of the look, a look taken once only.
    """
    (p,) = one()
    opt = step(make([p]), 2)
    group, before, kept = opt.param_groups[0], p.detach().clone(), dict(opt.param_groups[0])
    group.update(written)
    for act in (opt.step, opt.explain):
        with pytest.raises(ValueError, match=f"param group 0 now says {next(iter(written))}=.*Put the old value back"):
            act()
    assert p.equal(before)
    for name in written:
        group.pop(name)
    group.update(kept)
    step(opt)
    assert not p.equal(before)


def test_what_says_the_same_is_no_change():
    """Kills: texts compared with objects, lists with tuples, a group's own options taken for new ones."""
    own = {"ns_steps": 3, "split": [32, 32], "state": "bf16", "adjust_lr_fn": None}
    opt = step(shardopt.Muon([{"params": one(), **own}]))
    opt.param_groups[0].update(copy.deepcopy(own), addons="decay", rounding="nearest")
    step(opt)
    step(shardopt.Muon([{**group, "params": one()} for group in opt.param_groups]))
    opt.param_groups[0]["orthogonalizer"] = shardopt.polar.NewtonSchulz(steps=3)
    step(opt)
    step(copy.deepcopy(opt))
    step(pickle.loads(pickle.dumps(opt)))


def test_options_that_contradict_each_other_in_a_new_group():
    """Kills: torch.optim.Muon's names dropped where an orthogonalizer is given too."""
    with pytest.raises(ValueError, match="belong to a Newton-Schulz"):
        shardopt.Muon([{"params": one(), "orthogonalizer": "gram", "ns_steps": 4}])


def test_torchs_refused_options_are_refused_later_too():
    opt = step(shardopt.AdamW(one()))
    opt.param_groups[0]["amsgrad"] = True
    with pytest.raises(ValueError, match="amsgrad is not supported"):
        opt.step()
    opt.param_groups[0]["amsgrad"] = False
    step(opt)


@pytest.mark.parametrize(
    "make, written",
    [
        (lambda: shardopt.Muon(one()), {"betas": (0.9, 0.9)}),
        (lambda: shardopt.AdamW(one()), {"momentum": 0.5}),
        (lambda: ShardedOptimizer(one(), Recipe(rules.Lion())), {"weight_decay": 0.1}),
    ],
)
def test_a_number_that_nothing_reads_is_told_once(make, written):
    """Kills: a word in every step, none at all, one about the user's own keys or about what the step reads."""
    opt = step(make())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.param_groups[0].update(mine=3, lr=0.1, maximize=True)
        step(opt)
    opt.param_groups[0].update(written)
    with pytest.warns(UserWarning, match=f"has {next(iter(written))}, which .* does not read: it reads") as told:
        step(opt, 3)
    assert len(told) == 1


@pytest.mark.filterwarnings("error")
def test_numbers_act_and_schedulers_are_heard():
    """Also of a group with a recipe of its own beside the optimizer's decay, which it does not read."""
    adam, plain = {"params": one()}, {"params": one(), "recipe": Recipe(rules.AdamW())}
    opt = shardopt.AdamW([adam, plain], lr=0.1, weight_decay=0.1)
    assert "weight_decay" not in opt.param_groups[1]
    schedules = [OneCycleLR(opt, 0.1, total_steps=20), LambdaLR(opt, lambda k: 0.5**k)]
    for _ in range(3):
        step(opt)
        for schedule in schedules:
            schedule.step()
    opt.param_groups[0].update(weight_decay=0.3, eps=1e-3, betas=(0.5, 0.6))
    opt.add_param_group({"params": one(), "nesterov": True})
    again = shardopt.AdamW([{"params": one()}, {**plain, "params": one()}, {"params": one(), "nesterov": True}])
    again.load_state_dict(step(opt).state_dict())
    assert step(again).param_groups[0]["weight_decay"] == 0.3


def test_a_checkpoint_of_torchs_muon_brings_no_option():
    """Its eps neither, which would look like one. Kills: `eps` adopted into a group whose recipe has another."""
    saved = step(torch.optim.Muon(one(), eps=1e-3, ns_steps=4))
    opt = shardopt.Muon(one(), state="fp32", ns_steps=4)
    saved.param_groups[0]["differentiable"] = True  # how torch stepped, which is none of its state's meaning
    opt.load_state_dict(saved.state_dict())
    step(opt)
    assert not {"eps", "ns_steps", "differentiable"} & set(opt.param_groups[0])


def test_groups_that_stay_as_they_are_are_not_looked_at_again(monkeypatch):
    """By count, as host time is measured elsewhere. Kills: options compared with the recipe in every step, also where
    a scheduler writes the rate, the decay or betas."""
    looks = []
    true = groups.check_followed
    monkeypatch.setattr(groups, "check_followed", lambda *given: looks.append(given) or true(*given))
    opt = shardopt.AdamW([{"params": one()} for _ in range(3)], lr=0.1)
    assert len(looks) == 3
    for i in range(5):
        opt.param_groups[1].update(lr=0.1 / (i + 1), weight_decay=i * 1.0, betas=(0.9, 0.9 + i * 1e-3))
        step(opt)
    assert len(looks) == 6
