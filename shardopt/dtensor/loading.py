"""Loads a state dict without casting: everything is compared first, then copied into the storage that is there."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shardopt.dtensor.layout import local_of
from shardopt.dtensor.match import adopted, check_meaning, check_numbers, differences, sentence
from shardopt.recipe import Recipe
from shardopt.state import KEY, STEP
from shardopt.telling import tell

KEPT_OUT = ("params", "recipe", "state", "addons", "rounding", "update_from")  # compared, never adopted


def load_groups(
    groups: Sequence[dict[str, Any]], recipes: Sequence[Recipe], saved: Sequence[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups' numbers, to be taken over; recipes are compared, never adopted: other options are a warning."""
    if len(groups) != len(saved):
        raise ValueError(
            f"the state dict has {len(saved)} param groups, this optimizer {len(groups)}; build it with the same "
            "groups (in shardopt.build_optimizer roles, overrides and split make them)"
        )
    taken, told = [], []
    for i, (group, recipe, other) in enumerate(zip(groups, recipes, saved)):
        if len(group["params"]) != len(other["params"]):
            raise ValueError(
                f"param group {i} of the state dict has {len(other['params'])} parameters, here it has "
                f"{len(group['params'])}"
            )
        theirs = other.get("recipe")
        check_meaning(f"param group {i}", recipe, other, theirs)
        check_numbers(i, recipe, other)
        if theirs is not None and theirs.split("/")[1] != recipe.key().split("/")[1]:
            raise ValueError(
                f"param group {i} was saved with recipe {theirs}, this optimizer has {recipe.key()}. Build it with "
                "the saved codecs, or use shardopt.load_checkpoint, which transcodes the state"
            )
        told += differences(i, recipe, other)
        taken.append({name: x for name, x in other.items() if name not in KEPT_OUT and adopted(recipe, name)})
    if told and not (dist.is_initialized() and dist.get_rank()):
        tell(sentence(told))
    return taken


def load_states(
    pairs: Sequence[tuple[Any, Tensor]],
    saved: Mapping[Any, Mapping[str, Any]],
    present: Mapping[Tensor, dict[str, Tensor] | None],
    names: Mapping[Tensor, str],
) -> dict[Tensor, dict[str, Tensor]]:
    """Parameter -> its state with the saved contents. `present` is the state made for this recipe and mesh."""
    if unknown := set(saved) - {key for key, _ in pairs}:
        raise ValueError(f"the state dict has state for unknown parameters {sorted(map(str, unknown))[:3]}")
    copies: list[tuple[Tensor, Tensor]] = []
    contents: dict[Tensor, dict[str, Tensor]] = {}
    for key, p in pairs:
        if key not in saved:
            continue  # torch's optimizers hold no state of a parameter that never had a gradient
        want = present[p]
        if not want:
            raise ValueError(
                f"{names[p]} cannot be loaded while any parameter is on the meta device; call to_empty first"
            )
        have, held = dict(saved[key]), sorted(set(saved[key]) - {KEY})
        if STEP not in have:  # torch's SGD and friends count no steps
            have[STEP] = torch.ones(())
        if set(have) - {KEY} != set(want) - {KEY}:
            raise ValueError(
                f"{names[p]}: the state dict has {held}, this optimizer stores {sorted(set(want) - {KEY})}. Build the "
                "optimizer that saved it; where only its codecs are others, shardopt.load_checkpoint transcodes them"
            )
        for name, target in want.items():
            if name in have:
                copies.append((target, checked(f"{names[p]}: {name}", target, have[name])))
        contents[p] = want
    for target, source in copies:
        local_of(target).copy_(source)
    return contents


def checked(what: str, target: Tensor, source: Any) -> Tensor:
    """The local content for `target`, after its shape, dtype and sharding were compared."""
    if not isinstance(source, (Tensor, int, float)):
        raise ValueError(f"{what} is {source!r} in the state dict; it must be a tensor")
    if not isinstance(source, Tensor):
        source = torch.tensor(source)
    if what.endswith(f": {STEP}") and source.numel() == 1:  # torch and others keep counts in other dtypes
        return local_of(source).reshape(())
    if tuple(source.shape) != tuple(target.shape) or source.dtype != target.dtype:
        raise ValueError(
            f"{what} is {source.dtype} {tuple(source.shape)} in the state dict, "
            f"here {target.dtype} {tuple(target.shape)}"
        )
    if isinstance(source, DTensor) != isinstance(target, DTensor):
        raise ValueError(
            f"{what} is a {type(source).__name__} in the state dict, here a {type(target).__name__}. Load through "
            "torch.distributed.checkpoint.state_dict, which redistributes, or shardopt.load_checkpoint"
        )
    if isinstance(source, DTensor) and isinstance(target, DTensor):
        if source.placements != target.placements or source._local_tensor.shape != target._local_tensor.shape:
            source = source.redistribute(target.device_mesh, target.placements)
        return source._local_tensor.detach()
    return source.detach()
