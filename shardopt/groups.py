"""Param groups: what a group asks for beside its numbers, and the recipe that follows from it."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from shardopt.addons import Addon
from shardopt.codecs import view_shape
from shardopt.recipe import Recipe, addons_of
from shardopt.rules import Rule

RECIPE_KEYS = ("state", "addons", "rounding", "update_from")
COMMON = ("lr", "maximize", "foreach", "capturable", "differentiable")  # torch's group keys, whatever the recipe
REFUSED = {
    "amsgrad": "amsgrad is not supported; use amsgrad=False",
    "differentiable": "differentiable=True is not supported: the step is not recorded by autograd",
}


def complete(
    param_group: Mapping[str, Any], base: Recipe | None, given: Mapping[str, Any]
) -> tuple[dict[str, Any], Recipe]:
    """(a copy of the user's group with all its numbers, the recipe that it follows).

    base: the optimizer's recipe; given: what the user gave to the optimizer. A group may change numbers, switches of
    the rule (nesterov, centered, ...), state, addons, rounding and update_from. Add-ons without a decay keep the decay
    of the recipe.
    """
    group = dict(param_group)
    own = group.get("recipe")
    recipe = base if own is None or isinstance(own, str) else own
    if not isinstance(recipe, Recipe):
        raise ValueError(f"a param group needs a recipe (of its own or the optimizer's); got {recipe!r}")
    refuse(group)
    if misplaced := [name for name in ("nonfinite", "seed") if name in group]:
        raise ValueError(f"{', '.join(misplaced)} belongs to the optimizer, not to a param group")
    asked = set(group)
    for name, value in numbers(recipe, base, given).items():
        group.setdefault(name, value)
    rule = replace(recipe.rule, **recipe.rule.given(group))
    recipe = rebuilt(recipe, with_numbers(rule, group), {name: group[name] for name in RECIPE_KEYS if name in group})
    if "weight_decay" in asked and "weight_decay" not in recipe.defaults() and not_zero(group["weight_decay"]):
        raise ValueError(f"weight_decay is {group['weight_decay']}, but recipe {recipe.key()} has no decay add-on")
    for name in RECIPE_KEYS:
        if not isinstance(group.get(name, ""), str):
            del group[name]  # groups hold numbers, strings and tuples; the recipe's key says the rest
    group = {**recipe.defaults(), **group}  # a switch may bring a number of its own
    group.update({name: getattr(recipe.rule, name) for name in recipe.rule.switches()})
    if isinstance(own, str) and own != recipe.key():  # such as those of another optimizer's groups
        raise ValueError(
            f"a param group's recipe is the text {own!r}, but the group would follow {recipe.key()!r}; give the recipe "
            "itself, as shardopt.Recipe(shardopt.rules.AdamW(), 'fp32', ('decay',))"
        )
    group["recipe"] = recipe.key()
    return group, recipe


def refuse(options: Mapping[str, Any]) -> None:
    """ValueError for options of torch's that have no meaning here."""
    for name, words in REFUSED.items():
        if options.get(name):
            raise ValueError(words)


def numbers(recipe: Recipe, base: Recipe | None, given: Mapping[str, Any]) -> dict[str, Any]:
    """A group's defaults; with a recipe of its own what that chose, else what the optimizer was given, else usual."""
    if recipe is base:
        return {**recipe.defaults(), **given}
    usual = type(recipe.rule)().defaults()
    chosen = {name: value for name, value in recipe.defaults().items() if value != usual.get(name, 0.0)}
    return {**recipe.defaults(), **given, **chosen}


def check_read(given: Mapping[str, Any], recipes: Sequence[Recipe]) -> None:
    """ValueError for numbers that no group's recipe reads."""
    read = set(COMMON).union(*(set(recipe.defaults()) for recipe in recipes))
    if unread := sorted(set(given) - read):
        raise ValueError(
            f"nothing reads {', '.join(unread)}; these recipes read {', '.join(sorted(read - set(COMMON)))} "
            "(weight_decay needs a decay add-on)"
        )


def with_numbers(rule: Rule, group: Mapping[str, Any]) -> Rule:
    """The rule with the group's numbers, which checks their ranges."""
    return replace(rule, **{name: group[name] for name in rule.numbers if name in group})


def rebuilt(recipe: Recipe, rule: Rule, changes: Mapping[str, Any]) -> Recipe:
    """The recipe for another rule object and what a group changes; its formats are resolved anew for the slots."""
    state = changes.get("state", recipe.spec)
    if "state" not in changes and isinstance(state, Mapping):
        gone = {slot.name for slot in recipe.rule.slots()} - {slot.name for slot in rule.slots()}
        state = {name: codec for name, codec in state.items() if name not in gone}
    addons = recipe.addons
    if "addons" in changes:
        addons = addons_of(changes["addons"])
        if not any(is_decay(addon) for addon in addons):
            addons = (*addons, *(addon for addon in recipe.addons if is_decay(addon)))
    rounding = changes.get("rounding", recipe.rounding)
    return Recipe(rule, state, addons, rounding, changes.get("update_from", recipe.update_from))


def is_decay(addon: Addon) -> bool:
    return "weight_decay" in addon.defaults()


def unfit(recipe: Recipe, p: Tensor) -> str | None:
    """Why the recipe cannot step on a parameter like this, if it cannot: the end of a sentence about it."""
    if not p.is_floating_point():
        return f"is {p.dtype}; only real floating-point parameters can be optimized"
    return recipe.rule.unfit(view_shape(tuple(p.shape)))


def not_zero(value: Any) -> bool:
    return isinstance(value, Tensor) or value != 0


def cycled(groups: Sequence[Mapping[str, Any]], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Defaults in which OneCycleLR and CyclicLR look up the number that they cycle in ALL groups.

    It is `betas` where every group has some, else `momentum`: see `hand_on`.
    """
    others = {name: x for name, x in defaults.items() if name not in ("betas", "momentum")}
    betas = [group["betas"] for group in groups if "betas" in group]
    if betas and len(betas) == len(groups):
        return {**others, "betas": betas[0]}
    momenta = [group["momentum"] for group in groups if not isinstance(group.get("momentum", ""), str)]
    momenta += [beta[0] for beta in betas] + [group["beta1"] for group in groups if group.get("beta1")]
    return {**others, "momentum": momenta[0]} if momenta else others


def hand_on(rule: Rule, group: dict[str, Any]) -> None:
    """A momentum that such a scheduler wrote becomes betas[0] or beta1 of a rule that has one in its place."""
    if "momentum" in rule.numbers or isinstance(group.get("momentum", ""), str):
        return
    momentum = group.pop("momentum")
    if "momentum" in rule.switches():
        group["momentum"] = getattr(rule, "momentum")  # noqa: B009
    if "betas" in group:
        group["betas"] = (momentum, *group["betas"][1:])
    elif getattr(rule, "beta1", None):
        group["beta1"] = momentum


def numbers_of(recipe: Recipe, group: Mapping[str, Any]) -> list[Any]:
    """What `settled` reads of a group, in which a scheduler may change the rate without another look."""
    numbers = (group.get(name) for name in ("momentum", *recipe.rule.numbers) if name != "lr")  # see `hand_on`
    return [recipe, type(group.get("lr")), *numbers]


def settled(recipe: Recipe, group: dict[str, Any], started: bool, number: int) -> Recipe:
    """The group's recipe for this step; ValueError for numbers out of range, before anything is written.

    A scheduler may switch a momentum on (OneCycleLR does): before the group's first step the recipe follows, later
    the state that it needs is missing. Schedulers may end a hair below a rate of 0, as torch allows.
    """
    if "max_momentum" in group:
        hand_on(recipe.rule, group)
    lr = group.get("lr")
    if lr is None or isinstance(lr, str):
        raise ValueError(f"param group {number} has lr {lr!r}; it must be a number or a tensor")
    rule = with_numbers(recipe.rule, {**group, "lr": recipe.rule.defaults().get("lr", 0.0)})
    if rule.slots() == recipe.rule.slots():
        return recipe
    if started:
        was, now = ([slot.name for slot in r.slots()] for r in (recipe.rule, rule))
        raise ValueError(
            f"param group {number} now has numbers with which {recipe.rule.name} has the slots {now}, but its state "
            f"has {was}. Build the optimizer with a momentum that is not 0 (or keep it 0)"
        )
    return rebuilt(recipe, rule, {})
