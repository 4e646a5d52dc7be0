"""Every rule equals torch.optim where torch has it, and a float64 transcription of the paper everywhere."""

from dataclasses import replace
from itertools import product

import pytest
import torch

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from tests import spec
from tests.table import ADDONS, RULES, SPEC, TORCH, TORCH_FEW, WEIGHT_DECAY, excluded, gradients, recipe, weights

SHAPES = ((7, 15), (2, 16), (1, 1), (7,), (33, 64), (70, 130), (64, 64), (128, 96), (40, 3), ())
VIEWED = ((7, 15), (7,), (33, 64), (4, 6, 3, 3), (5, 3, 40), ())

TWINS = {
    "adamw": (shardopt.AdamW, torch.optim.AdamW, {}),
    "adamw odd": (
        shardopt.AdamW,
        torch.optim.AdamW,
        {"lr": 3e-3, "betas": (0.83, 0.957), "eps": 1e-6, "weight_decay": 0.13},
    ),
    "adamw maximize": (shardopt.AdamW, torch.optim.AdamW, {"maximize": True, "weight_decay": 0.1}),
    "adam": (shardopt.Adam, torch.optim.Adam, {"lr": 2e-3}),
    "adam l2": (shardopt.Adam, torch.optim.Adam, {"weight_decay": 0.07, "maximize": True}),
    "sgd": (shardopt.SGD, torch.optim.SGD, {"lr": 0.1}),
    "sgd momentum": (shardopt.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.83, "weight_decay": 0.03}),
    "sgd dampening": (shardopt.SGD, torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "dampening": 0.4}),
    "sgd nesterov": (
        shardopt.SGD,
        torch.optim.SGD,
        {"lr": 0.03, "momentum": 0.77, "nesterov": True, "weight_decay": 0.03, "maximize": True},
    ),
    "rmsprop": (shardopt.RMSprop, torch.optim.RMSprop, {"lr": 1e-3}),
    "rmsprop odd": (
        shardopt.RMSprop,
        torch.optim.RMSprop,
        {"lr": 1e-3, "alpha": 0.93, "eps": 1e-5, "momentum": 0.7, "centered": True, "weight_decay": 0.02},
    ),
    "adafactor": (shardopt.Adafactor, torch.optim.Adafactor, {}),
    "adafactor odd": (
        shardopt.Adafactor,
        torch.optim.Adafactor,
        {"lr": 0.3, "beta2_decay": -0.7, "eps": (1e-4, 2e-3), "d": 1.3, "weight_decay": 0.05},
    ),
}


def relative(a, b, start=None):
    """Distance by the norm of the expected tensor, or of its start: one element alone may end close to 0."""
    a, b, start = (None if x is None else x.detach() for x in (a, b, start))
    norm = b.double().norm() if start is None else torch.maximum(b.double().norm(), start.double().norm())
    return float((a.double() - b.double()).norm() / norm)


def near(p):
    """How far from torch a tensor of this size may be."""
    return TORCH if p.numel() >= 64 else TORCH_FEW


def tensors(shapes):
    return [torch.nn.Parameter(weights(shape, seed=i)) for i, shape in enumerate(shapes)]


def draws(shapes, steps):
    """Normal gradients, a tenth of them exactly 0."""
    draw = torch.Generator().manual_seed(11)

    def one(shape):
        g = torch.randn(shape, generator=draw)
        return torch.where(torch.rand(shape, generator=draw) < 0.1, 0.0, g)

    return [[one(shape) for shape in shapes] for _ in range(steps)]


@pytest.mark.parametrize("name", TWINS)
def test_equals_torch(name):
    """50 random steps of every tensor. Kills: eps inside the root, decay after the step, bias correction from calls."""
    ours, theirs, options = TWINS[name]
    state = {"state": "factored" if ours is shardopt.Adafactor else "fp32"}
    mine, other = tensors(SHAPES), tensors(SHAPES)
    a, b = ours(mine, **state, **options), theirs(other, **options)
    for gs in draws(SHAPES, 50):
        for p, q, g in zip(mine, other, gs):
            p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
    for p, q, start in zip(mine, other, tensors(SHAPES)):
        assert relative(p, q, start) < near(p), tuple(p.shape)
    for p, q in zip(mine, other):
        for slot in set(a.state[p]) & set(b.state[q]) - {"step"} if p.numel() > 1 else ():
            assert relative(a.state[p][slot], b.state[q][slot]) < near(p), (slot, tuple(p.shape))


def test_what_differs_from_torch_is_torch():
    """Seven elements with gradients over decades: here 2e-7 from float64 after 50 steps, torch 9e-7, since it rounds
    p for the decay and again for the update. Kills: p rounded twice a step."""
    start = weights((7,))
    p, q, exact, states = torch.nn.Parameter(start.clone()), torch.nn.Parameter(start.clone()), [start.double()], [{}]
    a, b = shardopt.AdamW([p], state="fp32"), torch.optim.AdamW([q])
    for t, g in enumerate(gradients((7,), 50, seed=23), start=1):
        p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
        exact = spec.step(rules.AdamW(), ("decay",), 0.01, exact, [g.double()], states, t)
    assert relative(p, exact[0], start) < 0.5 * relative(q, exact[0], start)


@pytest.mark.parametrize("gap", [1, 3])
def test_a_late_parameter_is_corrected_from_its_own_first_step(gap):
    """A parameter whose first gradient comes late has its own t, as in torch. Kills: bias correction from calls."""
    mine, other = tensors([(7, 15), (7,)]), tensors([(7, 15), (7,)])
    a, b = shardopt.AdamW(mine, lr=0.1, state="fp32"), torch.optim.AdamW(other, lr=0.1)
    for i, gs in enumerate(draws([(7, 15), (7,)], 8)):
        for j, (p, q, g) in enumerate(zip(mine, other, gs)):
            late = j == 1 and i < gap
            p.grad, q.grad = (None, None) if late else (g.clone(), g.clone())
        a.step()
        b.step()
    assert all(relative(p, q) < near(p) for p, q in zip(mine, other))
    assert [float(a.state[p]["step"]) for p in mine] == [8, 8 - gap]


def run_against_spec(made, addons, steps=10, shapes=VIEWED, fused=False):
    """Largest relative distance of any tensor from the float64 evaluation."""
    rule = made.rule
    ps = tensors(shapes)
    decays = {"decay", "cautious_decay", "l2"} & set(addons)
    optimizer = ShardedOptimizer(ps, made, fused=fused, **({"weight_decay": WEIGHT_DECAY} if decays else {}))
    exact, states = [p.detach().double() for p in ps], [{} for _ in ps]
    for t, gs in enumerate(draws(shapes, steps), start=1):
        for p, g in zip(ps, gs):
            p.grad = g.clone()
        optimizer.step()
        exact = spec.step(rule, addons, WEIGHT_DECAY, exact, [g.double() for g in gs], states, t)
    return max(relative(p, q, start) for p, q, start in zip(ps, exact, tensors(shapes)))


def state_for(rule):
    return "factored" if rule.startswith("adafactor") else "fp32"


COMBINATIONS = [(r, a) for r in RULES for a in ADDONS if not excluded(r, a)]
KERNELS = ("adamw.nesterov", "rmsprop.centered", "adafactor.update", "adafactor.fixed")  # asking 0, 0, 2 and 0 means


@pytest.mark.parametrize("rule, addons", COMBINATIONS)
def test_equals_the_paper(rule, addons):
    """10 steps of every rule with every set of add-ons; in kernels, of one rule of a kind: the rest of a kernel sees
    no more of its rule. Kills: a masked decay, the mask's mean over the wrong count, add-ons in the wrong order,
    GC over the wrong dim, beta1 and beta2 swapped in Lion."""
    made = Recipe(RULES[rule](), {"signed": "fp32", "non_negative": state_for(rule)}, ADDONS[addons])
    assert run_against_spec(made, ADDONS[addons]) < SPEC
    if rule in KERNELS and (addons != "mars" or rule == KERNELS[0]):  # it is the same before any rule
        assert run_against_spec(made, ADDONS[addons], fused=None) < SPEC


MOMENTA = ({}, {"beta1": 0.85}, {"beta1": 0.85, "momentum": "raw"})
DECAYS = ("torch", "scaled", "decoupled")
SECONDS = {
    "decayed": {"beta2_decay": -0.75},
    "fixed": {"beta2": 0.98},
    "corrected": {"beta2": 0.98, "bias_correction": True},
    "unclipped": {"beta2": 0.98, "bias_correction": True, "d": 0.0},
}


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize(
    "eps", [("add", (1e-30, 1e-3)), ("add", (None, 1e-2)), ("clamp", (None, 1e-3)), ("clamp", (1e-2, 1e-3))]
)
def test_adafactor_modes(eps, second):
    """All options against each other; in kernels, any three of them. Kills: alpha where rho is meant in a decay, eps
    added where torch clamps."""
    for a, b, c, d in product(range(3), range(3), range(2), range(2)):
        mode = {**MOMENTA[a], "decay": DECAYS[b], "relative_step": c == 0, "scale_parameter": d == 0}
        rule = rules.Adafactor(lr=3e-2, eps_mode=eps[0], eps=eps[1], **SECONDS[second], **mode)
        made = Recipe(rule, {"signed": "fp32", "non_negative": "factored"}, ("decay",))
        for fused in (False, True)[: 1 + ((a + b + 2 * c + d) % 4 == list(SECONDS).index(second))]:
            distance = run_against_spec(made, ("decay",), 6, ((7, 15), (7,), (5, 3, 40)), fused)
            assert distance < SPEC, (mode, fused)


def test_mars_begins_with_the_gradient_itself():
    """Kills: a first step against a last_grad of zero, which is gamma beta / (1 - beta) too long."""
    p, q = tensors([(7, 15)])[0], tensors([(7, 15)])[0]
    p.grad, q.grad = draws([(7, 15)], 1)[0][0], draws([(7, 15)], 1)[0][0]
    shardopt.SGD([p], lr=1.0, momentum=0.9, state="fp32", addons=[shardopt.Mars(clip=False)]).step()
    torch.optim.SGD([q], lr=1.0, momentum=0.9).step()
    assert p.equal(q)


def test_clip_by_global_norm_is_clip_grad_norm():
    """Over all tensors at once. Kills: a norm of each parameter for itself."""
    mine, other = tensors(SHAPES), tensors(SHAPES)
    a = shardopt.AdamW(mine, state="fp32", addons=[shardopt.ClipByGlobalNorm(max_norm=0.3)])
    b = torch.optim.AdamW(other)
    for gs in draws(SHAPES, 10):
        for p, q, g in zip(mine, other, gs):
            p.grad, q.grad = g.clone(), g.clone()
        torch.nn.utils.clip_grad_norm_(other, 0.3)
        a.step()
        b.step()
    assert all(relative(p, q, start) < near(p) for p, q, start in zip(mine, other, tensors(SHAPES)))
    p, q = tensors([(7, 15)])[0], tensors([(7, 15)])[0]
    p.grad, q.grad = draws([(7, 15)], 1)[0][0] * 1e-3, draws([(7, 15)], 1)[0][0] * 1e-3
    shardopt.SGD([p], lr=1.0, addons=["clip_by_global_norm"]).step()
    torch.optim.SGD([q], lr=1.0).step()
    assert p.equal(q), "a small norm is left alone"


@pytest.mark.parametrize("rule", RULES)
def test_group_numbers_are_what_counts(rule):
    """A rule's fields are defaults only: numbers changed in the group act at once. Kills: self.lr, self.eps, ... read
    in a rule."""
    made = recipe(rule, addons="decay")
    a, b = tensors([(7, 15)]), tensors([(7, 15)])
    first = ShardedOptimizer(a, made, weight_decay=0.5)
    numbers = {name: smaller(getattr(made.rule, name)) for name in made.rule.numbers}
    second = ShardedOptimizer(b, Recipe(replace(made.rule, **numbers), "fp32", ("decay",)), weight_decay=0.5)
    first.param_groups[0].update(numbers)
    for (g,) in draws([(7, 15)], 3):
        a[0].grad, b[0].grad = g.clone(), g.clone()
        first.step()
        second.step()
    assert a[0].equal(b[0])


def smaller(number):
    if isinstance(number, tuple):
        return tuple(smaller(each) for each in number)
    return None if number is None else 0.8 * number
