"""No option is silently ignored: every field of every rule and add-on changes the result."""

import pytest
import torch

from shardopt import Cautious, ClipByGlobalNorm, Recipe, RMSClip
from shardopt.addons import ADDONS
from tests.table import RULES, weights
from tests.test_pitfalls import SHAPE, noise, start

OPTIONS = {
    "adamw": {"bias_correction": False, "atan2": True, "nesterov": True, "eps": 1e-3, "betas": (0.5, 0.5), "lr": 1.0},
    "lion": {"betas": (0.1, 0.2), "lr": 1.0},
    "sgd.dampening": {"momentum": 0.5, "dampening": 0.1, "lr": 1.0},
    "rmsprop": {"alpha": 0.5, "eps": 1e-2, "momentum": 0.5, "centered": True, "bias_correction": True, "lr": 1.0},
    "adafactor.update": {
        "lr": 0.5, "beta2_decay": -0.5, "beta2": 0.9, "beta1": 0.1, "eps": (1e-4, 1.0), "d": 0.1,
        "relative_step": False,
        "scale_parameter": False, "momentum": "raw", "decay": "scaled", "eps_mode": "add",
    },
    "sgd.momentum": {"nesterov": True},
}  # fmt: skip


@pytest.mark.parametrize("rule", OPTIONS)
def test_no_option_is_ignored(rule):
    """P38. Every field of every rule changes the result. Kills: an option that is accepted and never read."""
    base = RULES[rule]()
    base = type(base)(**{**vars(base), "lr": 0.9})
    tried = {name for line in OPTIONS if line.split(".")[0] == rule.split(".")[0] for name in OPTIONS[line]}
    tried.add("bias_correction")  # Adafactor's needs a beta2: test_adafactor_modes
    assert tried >= set(vars(base)), "a new option needs a line above"
    ends = {}
    for name, value in {"": None, **OPTIONS[rule]}.items():
        made = Recipe(type(base)(**{**vars(base), **({name: value} if name else {})}), addons=("decay",))
        run = start(made, weight_decay=1.0, p=weights(SHAPE) * 1e-2)
        for g in noise(3, scale=1e-5):
            run.step(g)
        ends[name] = run.p[0]
    assert [name for name in OPTIONS[rule] if ends[name].equal(ends[""])] == []


def test_no_addon_option_is_ignored():
    """P38 for add-ons: every one of them, and every option, changes the result."""
    ends = []
    choices = [*ADDONS, Cautious(count="all"), Cautious(floor=0.9), ClipByGlobalNorm(max_norm=1e-5), RMSClip(d=0.01)]
    for addon in ["none", *choices]:
        made = Recipe(RULES["sgd.momentum"](), addons=() if addon == "none" else (addon,))
        run = start(made, weight_decay=1.0)
        for g in noise(3, scale=3.0):
            run.step(torch.where(g.abs() > 1, g, 0.0))
        ends.append(run.p[0])
    assert not any(a.equal(b) for i, a in enumerate(ends) for b in ends[:i])
