"""The param groups of a checkpoint, however they were stored: nested, flattened by parameter, or as one list."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from shardopt.dtensor.channel import Channel
from shardopt.dtensor.loading import KEPT_OUT
from shardopt.dtensor.match import adopted, check_numbers, differences
from shardopt.dtensor.stored import Stored
from shardopt.recipe import Recipe

# switches of torch's own implementations
TORCHS_OWN = ("amsgrad", "foreach", "fused", "capturable", "differentiable", "decoupled_weight_decay", "nesterov")


class SavedGroups:
    """Hyper-parameters by parameter name. Reading them is a collective. names: all parameters that have some."""

    def __init__(self, stored: Stored, channel: Channel, key: str, known: Iterable[str]) -> None:
        self.manifest = stored.manifest or {}
        prefix = f"{key}.param_groups"
        names = [name for name in stored.entries if name == prefix or name.startswith(prefix + ".")]
        values = {name[len(prefix) + 1 :]: value for name, value in stored.values(names, channel).items()}
        self.by_name: dict[str, dict[str, Any]] = {}
        if "" in values:
            groups = list(values[""])
        elif any(re.fullmatch(r"\d+\.params", name) for name in values):
            groups = nested(values)
        else:
            groups = flattened(values, known)
        for group in groups:
            self.by_name.update(dict.fromkeys(map(str, group.get("params", ())), group))

    @property
    def names(self) -> Iterable[str]:
        return self.by_name.keys()

    def recipe_of(self, name: str) -> str | None:
        """The key of the recipe that a parameter was saved with; None for an optimizer without recipes."""
        for recipe in self.manifest.get("recipes", ()):
            if name in recipe["params"]:
                return recipe.get("key")
        found = self.by_name.get(name, {}).get("recipe")
        return found if isinstance(found, str) else None

    def saved(self, names: Iterable[str]) -> dict[str, Any]:
        """The group of the first of these parameters that was saved."""
        return next((self.by_name[name] for name in names if name in self.by_name), {})

    def differences(self, number: int, recipe: Recipe, names: Iterable[str]) -> list[str]:
        """What these parameters' groups were saved with and here have not, in words; ValueError for unfit numbers."""
        check_numbers(number, recipe, self.saved(names))
        groups = {id(group): group for name in names if (group := self.by_name.get(name)) is not None}
        return list(dict.fromkeys(text for group in groups.values() for text in differences(number, recipe, group)))

    def restore(self, group: dict[str, Any], names: Iterable[str], recipe: Recipe | None) -> None:
        """Take over the numbers of the first parameter that was saved; tensors keep their storage."""
        for key, value in self.saved(names).items():
            if key in (*KEPT_OUT, "param_names") or not adopted(recipe, key):
                continue
            if key in TORCHS_OWN and key not in group:
                continue
            present = group.get(key)
            if isinstance(present, Tensor):
                present.copy_(torch.as_tensor(value))
            else:
                group[key] = value.item() if isinstance(value, Tensor) and key in group else value


def nested(values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From `0.lr`, `0.params`: one dict a group."""
    groups: dict[int, dict[str, Any]] = {}
    for name, value in values.items():
        index, _, key = name.partition(".")
        groups.setdefault(int(index), {})[key] = value
    return [groups[index] for index in sorted(groups)]


def flattened(values: Mapping[str, Any], known: Iterable[str]) -> list[dict[str, Any]]:
    """From `layer.weight.lr`: one dict a parameter."""
    groups = []
    for fqn in known:
        found = {name[len(fqn) + 1 :]: value for name, value in values.items() if name.startswith(fqn + ".")}
        found = {key: value for key, value in found.items() if "." not in key}
        if found:
            groups.append({**found, "params": [fqn]})
    return groups
