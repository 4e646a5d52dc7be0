"""Base of the named optimizers: a rule, its usual decay, and the options that all share."""

from inspect import signature
from typing import Any

from shardopt import rules
from shardopt.groups import is_decay, refuse
from shardopt.optimizer import ShardedOptimizer
from shardopt.recipe import Recipe, addons_of
from shardopt.spelling import near

INTERNAL = ("self", "params", "rule", "decay", "more")  # between a preset and what it is built on

SHARED = """
    state: how states are stored: "fp32", "bf16", "int8", "int4", "factored", a codec, or a mapping from slot names to
    codecs. addons: what else is done, objects or names. rounding: how low-precision parameters are written,
    "nearest", "stochastic" or "kahan". update_from: "fresh" or "stored" (see Recipe). fused, nonfinite, seed: see
    ShardedOptimizer. foreach, capturable and differentiable=False are accepted and change nothing.
"""


def recipe_of(rule: rules.Rule, state: Any, addons: Any, rounding: str, update_from: str, decay: Any) -> Recipe:
    """The recipe of a preset: its usual decay unless the user chose one."""
    chosen = addons_of(addons)
    if not any(is_decay(addon) for addon in chosen):
        chosen = (*chosen, decay)
    return Recipe(rule, state, chosen, rounding, update_from)


def arguments_of(preset: type) -> list[str]:
    """The names of all that a preset takes beside params."""
    takers = [c for c in preset.__mro__ if issubclass(c, Preset) and "__init__" in vars(c)]
    found = [p for c in takers for p in signature(c.__init__).parameters.values()]
    named = dict.fromkeys(p.name for p in found if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return [name for name in named if name not in INTERNAL]


def unexpected(preset: type, names: list[str]) -> str:
    """The words for options that a preset does not take."""
    known = arguments_of(preset)
    counts = "an unexpected keyword argument" if len(names) == 1 else "unexpected keyword arguments"
    return (
        f"{preset.__name__}() got {counts} {', '.join(map(repr, names))}; it takes {', '.join(known)}"
        f"{near(names[0], known)}"
    )


class Preset(ShardedOptimizer):
    """A named optimizer. Subclasses have the signature and the defaults by which the field knows them."""

    def __init__(
        self,
        params: Any,
        rule: rules.Rule,
        decay: Any,
        weight_decay: Any,
        *,
        state: Any,
        addons: Any = (),
        rounding: str = "nearest",
        update_from: str = "fresh",
        fused: bool | None = None,
        nonfinite: str = "propagate",
        seed: int = 0,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        **unknown: Any,
    ) -> None:
        if unknown:
            raise TypeError(unexpected(type(self), list(unknown)))
        refuse({"differentiable": differentiable})
        if not hasattr(weight_decay, "device") and weight_decay < 0:
            raise ValueError(f"weight_decay is {weight_decay}; it must be at least 0")
        recipe = recipe_of(rule, state, addons, rounding, update_from, decay)
        super().__init__(
            params,
            recipe,
            fused=fused,
            nonfinite=nonfinite,
            seed=seed,
            lr=getattr(rule, "lr"),  # noqa: B009
            weight_decay=weight_decay,
            maximize=maximize,
            foreach=foreach,
            capturable=capturable,
        )
