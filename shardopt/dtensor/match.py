"""What of a saved param group must be as it is here, since stored state means it, and what may differ and is told."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from shardopt.recipe import Recipe
from shardopt.rules import RULES, Rule

TORCHS = {"amsgrad": "adamw", "dampening": "sgd", "centered": "rmsprop", "beta2_decay": "adafactor", "ns_steps": "muon"}
DECAYS = ("l2", "decay")


def check_meaning(what: str, recipe: Recipe, saved: Mapping[str, Any], key: str | None) -> None:
    """ValueError where stored state would mean something else. what: whose, in words. key: the saved recipe's, if any.

    The rule must be the saved one, and the switches that it calls `of_state`.
    """
    rule = recipe.rule
    if key is not None and key.split("/")[0].split(".")[0] != rule.name:
        raise ValueError(
            f"{what} was saved with recipe {key}, this optimizer has {recipe.key()}: another rule's state has another "
            "meaning. Build the optimizer with the saved rule, or load the model alone"
        )
    told = {name for word, name in TORCHS.items() if word in saved} if key is None and rule.name in RULES else ()
    if told and rule.name not in told:
        raise ValueError(
            f"{what} was saved by torch.optim's {', '.join(sorted(told))}, this optimizer has {recipe.key()}: another "
            "rule's state has another meaning. Build the optimizer with the saved rule, or load the model alone"
        )
    theirs = rule.options_of(saved) if key is None else written(rule, key)
    for name in rule.of_state:
        here = getattr(rule, name)
        if name in theirs and str(theirs[name]) != str(here):
            raise ValueError(
                f"{what} was saved with {name}={theirs[name]}, here it is {here}: the same stored state would mean "
                f"something else. Build the optimizer with {name}={theirs[name]!r}"
            )


def written(rule: Rule, key: str) -> dict[str, Any]:
    """The switches `of_state` as a recipe's key has them: only what is not the default is in it."""
    words = [word.partition("=") for word in key.split("/")[0].split(".")[1:]]
    said = {name: value or True for name, _, value in words}
    return {field.name: said.get(field.name, field.default) for field in fields(rule) if field.name in rule.of_state}


def check_numbers(number: int, recipe: Recipe, saved: Mapping[str, Any]) -> None:
    """ValueError where the numbers to be adopted would ask for other slots or another structure (and for amsgrad)."""
    if saved.get("amsgrad"):
        raise ValueError(f"param group {number} was saved with amsgrad=True, which no optimizer here has")
    rule = recipe.rule
    numbers = {name: saved[name] for name in rule.numbers if name in saved and name != "lr"}
    try:
        other = replace(rule, **numbers)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"param group {number} was saved with {numbers}, which {rule.name} cannot take ({error}). Build the "
            "optimizer that saved it"
        ) from error
    if (other.slots(), other.structure()) != (rule.slots(), rule.structure()):
        raise ValueError(
            f"param group {number} was saved with {numbers}, with which {rule.name} has other slots than this "
            "optimizer's or another use for them. Build the optimizer with the saved numbers"
        )


def differences(number: int, recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    """In words: what the run goes on with otherwise than it was saved. Codecs, which are transcoded, are no news."""
    rule, key = recipe.rule, saved.get("recipe")
    mine: dict[str, Any] = {name: getattr(rule, name) for name in rule.switches()}
    theirs = rule.options_of(saved)
    if isinstance(key, str):
        if key.split("/")[0].split(".")[0] != rule.name:
            return []  # refused wherever there is state
        mine |= beside_rule(recipe.key())
        theirs |= beside_rule(key)
    changed = [name for name in mine if name in theirs and plain(theirs[name]) != plain(mine[name])]
    told = []
    if changed:
        before, after = (", ".join(f"{name}={x[name]!r}" for name in changed) for x in (theirs, mine))
        same = ": the same lr means another step" if "adjust_lr" in changed else ""
        told.append(f"param group {number} was saved with {before}; here it has {after}{same}")
    return told + other_decay(number, recipe, saved)


def beside_rule(key: str) -> dict[str, Any]:
    """Add-ons, but for the kind of decay, and how parameters are written, from a recipe's key."""
    _, _, addons, rounding, *stored = key.split("/")
    names = [name for name in addons.split(",") if name not in (*DECAYS, "-")]
    return {"addons": ",".join(names), "rounding": rounding, "update_from": stored[0] if stored else "fresh"}


def other_decay(number: int, recipe: Recipe, saved: Mapping[str, Any]) -> list[str]:
    """A weight decay that was coupled and here is not, or the reverse."""
    kinds = [addon.name for addon in recipe.addons if addon.name in (*DECAYS, "cautious_decay")]
    was = saved.get("decoupled_weight_decay")
    if was is None and isinstance(saved.get("recipe"), str):
        was = "l2" not in saved["recipe"].split("/")[2].split(",")
    elif was is None and "momentum" in saved and "ns_steps" not in saved:
        was = False  # torch's SGD and RMSprop
    if was is None or not kinds or not float(saved.get("weight_decay") or 0) or was == (kinds[0] != "l2"):
        return []
    words = ("coupled (l2)", "decoupled")
    return [
        f"param group {number} was saved with weight_decay {float(saved['weight_decay']):g}, {words[bool(was)]}, "
        f"here it is {words[not was]}: the same number means another decay"
    ]


def adopted(recipe: Recipe | None, name: str) -> bool:
    """Whether an entry of a saved group is taken over; None: by an optimizer of torch's."""
    if recipe is None:
        return True
    rule = recipe.rule
    unread = {*rule.numbers, *rule.aliases} - set(rule.defaults())  # such as the phase of another mode
    return name not in (*rule.switches(), *unread, "differentiable")  # which is how torch steps, not what a step is


def sentence(told: list[str]) -> str:
    return f"{'; '.join(told)}. What is given here is used"


def plain(value: Any) -> Any:
    """As it can be compared, however it was stored."""
    return tuple(map(plain, value)) if isinstance(value, (list, tuple)) else value
