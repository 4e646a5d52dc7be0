"""Param groups: what a group asks for beside its numbers, and the recipe that follows from it."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from typing import Any

from torch import Tensor

from shardopt.addons import Addon
from shardopt.codecs import view_shape
from shardopt.given import check_first_rate, check_rate
from shardopt.kernels.walk import same
from shardopt.recipe import Recipe, addons_of
from shardopt.rules import RULES, Rule
from shardopt.spelling import near
from shardopt.telling import tell

RECIPE_KEYS = ("state", "addons", "rounding", "update_from")
NUMBERS = tuple(dict.fromkeys(["weight_decay", *(n for rule in RULES.values() for n in rule.numbers if n != "lr")]))
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
    if isinstance(group.get("params"), Iterator):
        group["params"] = list(group["params"])
    own = group.get("recipe")
    recipe = base if own is None or isinstance(own, str) else own
    if not isinstance(recipe, Recipe):
        raise ValueError(
            f"a param group needs a recipe, its own or the optimizer's, but has {recipe!r}; for AdamW with fp32 state "
            "and decay give it 'recipe': shardopt.Recipe(shardopt.rules.AdamW(), 'fp32', ('decay',))"
        )
    refuse(group)
    if words := misspelt(recipe, group):
        raise ValueError(f"a param group {words}")
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
    for name in set(given) - asked - set(recipe.defaults()) - set(COMMON):
        group.pop(name, None)  # the optimizer's: a number that this group's recipe does not read
    group.update({name: getattr(recipe.rule, name) for name in recipe.rule.switches()})
    if isinstance(own, str) and own != recipe.key():  # such as those of another optimizer's groups
        raise ValueError(
            f"a param group's recipe is the text {own!r}, but the group would follow {recipe.key()!r}; give the recipe "
            "itself, as shardopt.Recipe(shardopt.rules.AdamW(), 'fp32', ('decay',))"
        )
    group["recipe"] = recipe.key()
    check_first_rate("a param group", group["lr"])
    check_followed("a param group", recipe, group)
    return group, recipe


def misspelt(recipe: Recipe, group: Mapping[str, Any]) -> str:
    """In words, or "": a key that is nobody's but much like an option. torch lets a group hold what its user wants."""
    known = {*NUMBERS, *COMMON, *REFUSED, *RECIPE_KEYS, *recipe.rule.switches(), *recipe.rule.aliases}
    for name in group.keys() - known - {"params", "param_names", "recipe", "nonfinite", "seed"}:
        if meant := near(name, known, cutoff=0.85):
            return f"has the key {name!r}, which nothing reads (if it is yours, choose another name){meant}"
    return ""


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
            f"(weight_decay needs a decay add-on){near(unread[0], read)}"
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


class Look:
    """What `settled` saw of a group, in which a scheduler may change the rate without another look."""

    def __init__(self, recipe: Recipe, group: Mapping[str, Any]) -> None:
        self.recipe, self.options = recipe, watched(recipe)
        self.heard = self.of_options(group)
        numbers = ("momentum", *(name for name in recipe.rule.numbers if name != "lr"))  # see `hand_on`
        read = dict.fromkeys((*numbers, *self.options))
        self.entries = itemgetter("params", *(name for name in read if name in group))
        self.rate, self.size, self.seen = rate_of(group), len(group), self.entries(group)

    def holds(self, recipe: Recipe, group: Mapping[str, Any]) -> bool:
        """Whether all is as it was: the very same objects, and no entry came or went."""
        if recipe is not self.recipe or len(group) != self.size or rate_of(group) is not self.rate:
            return False
        try:
            return same(self.entries(group), self.seen)
        except KeyError:
            return False

    def of_options(self, group: Mapping[str, Any]) -> list[Any]:
        return list(map(group.get, self.options))

    def followed(self, group: Mapping[str, Any]) -> bool:
        """Whether the options are those that the recipe was seen to follow."""
        return same(self.of_options(group), self.heard)


def rate_of(group: Mapping[str, Any]) -> Any:
    """What of the rate must be looked at anew: a tensor, or the type of what is none."""
    lr = group.get("lr")
    return lr if isinstance(lr, Tensor) else type(lr)


def watched(recipe: Recipe) -> list[str]:
    """The entries of a group that a step does not read: what they say is in the recipe, or nothing reads it."""
    others = [name for name in NUMBERS if name not in recipe.defaults()]
    return [*recipe.rule.switches(), *recipe.rule.aliases, *RECIPE_KEYS, "recipe", *REFUSED, *others]


def check_followed(what: str, recipe: Recipe, group: Mapping[str, Any]) -> None:
    """ValueError where a group's options say something else than the recipe that was made of them."""
    refuse(group)
    rule = recipe.rule
    wrong = [name for name in rule.switches() if name in group and not means(group[name], getattr(rule, name))]
    for name in rule.aliases:
        meant = rule.given({name: group[name]}) if name in group else {}
        wrong += [name for switch, value in meant.items() if value != getattr(rule, switch)]
    for name in RECIPE_KEYS:
        if name in group and rebuilt(recipe, rule, {name: group[name]}) != recipe:
            wrong.append(name)
    if group.get("recipe", recipe.key()) != recipe.key():
        wrong.append("recipe")
    if wrong:
        raise ValueError(
            f"{what} now says {', '.join(f'{name}={group[name]!r}' for name in wrong)}, but it is stepped by "
            f"{recipe.key()}: a step reads {', '.join(recipe.defaults())} and maximize from the group, other options "
            "are settled when the group is added. Put the old value back, or build another optimizer with the new one "
            "and load a checkpoint of this one"
        )


def unread(recipe: Recipe, group: Mapping[str, Any]) -> list[str]:
    """Numbers of other recipes in a group, which nothing reads there."""
    known = {*recipe.defaults(), *recipe.rule.switches(), *recipe.rule.aliases}
    return [name for name in NUMBERS if name in group and name not in known and not_zero(group[name])]


def means(value: Any, held: Any) -> bool:
    """Whether a rule holds this for what a group says: a tuple for a list, the text of an orthogonalizer."""
    if isinstance(value, list):
        value = tuple(value)
    return value is held or value == held or (hasattr(value, "describe") and value.describe() == held)


def settled(recipe: Recipe, group: dict[str, Any], started: bool, number: int, look: Look | None = None) -> Recipe:
    """The group's recipe for this step; ValueError for numbers out of range, before anything is written, and for
    options that a step does not read and that are not the recipe's. look: the last one at this group.

    A scheduler may switch a momentum on (OneCycleLR does): before the group's first step the recipe follows, later
    the state that it needs is missing. Schedulers may end a hair below a rate of 0, as torch allows.
    """
    if "max_momentum" in group:
        hand_on(recipe.rule, group)
    check_rate(f"param group {number}", group.get("lr"), group["params"])
    if (look is None or len(group) != look.size) and (words := misspelt(recipe, group)):
        tell(f"param group {number} {words}")
    if look is None or recipe is not look.recipe or not look.followed(group):
        check_followed(f"param group {number}", recipe, group)
        if names := unread(recipe, group):
            tell(
                f"param group {number} has {', '.join(names)}, which {recipe.key()} does not read: it reads "
                f"{', '.join(recipe.defaults())}"
            )
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
