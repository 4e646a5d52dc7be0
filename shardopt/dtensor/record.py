"""What a checkpoint records of an optimizer: its state by parameter names, its recipes, how each slot is stored."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from shardopt.codecs import view_shape
from shardopt.dtensor import lazy
from shardopt.dtensor.manifest import FORMAT


def optimizer_state(model: torch.nn.Module, opt: torch.optim.Optimizer) -> tuple[list[list[str]], dict[str, Any]]:
    """(names of the parameters of every group, the optimizer's nested state dict by those names)."""
    if hasattr(opt, "settle"):
        opt.settle()  # a scheduler may have switched a momentum on
    for group in opt.param_groups:
        if any(lazy.is_meta(p) for p in group["params"]):
            raise ValueError("the optimizer holds parameters on the meta device; save and load after to_empty")
    try:
        state: dict[str, Any] = dict(get_optimizer_state_dict(model, opt))
    except KeyError as error:
        raise ValueError(
            f"the optimizer holds a parameter that this model has not ({error}): it was built before fully_shard or "
            "to_empty replaced the parameters, or for another model"
        ) from error
    names = [list(group["params"]) for group in state["param_groups"]]
    for group, recipe in zip(state["param_groups"], getattr(opt, "recipes", ())):
        coupled = any(addon.name == "l2" for addon in recipe.addons)
        for key, value in torchs_switches(coupled, bool(getattr(recipe.rule, "nesterov", False))).items():
            group.setdefault(key, value)
    return names, state


def torchs_switches(coupled: bool, nesterov: bool) -> dict[str, Any]:
    """What torch.optim's own groups hold besides numbers: without them torch could not load fp32 state of ours."""
    off = dict.fromkeys(("amsgrad", "maximize", "capturable", "differentiable"), False)
    return {**off, "foreach": None, "fused": None, "nesterov": nesterov, "decoupled_weight_decay": not coupled}


def record_of(opt: torch.optim.Optimizer, names: Sequence[Sequence[str]]) -> dict[str, Any]:
    """What the manifest says about the optimizer: recipes by group, and how every parameter's slots are stored."""
    by_group = getattr(opt, "recipes", None)  # made anew on every look
    described = [recipe.describe() for recipe in by_group or ()]
    described = described or [{"optimizer": type(opt).__name__} for _ in names]
    parameters: dict[str, Any] = {}
    for number, (group, group_names) in enumerate(zip(opt.param_groups, names)):
        for name, p in zip(group_names, group["params"]):
            state = opt.state.get(p, {})
            codecs = by_group[number].codecs(view_shape(tuple(p.shape)), p.dtype) if by_group else {}
            parameters[name] = {
                "shape": list(p.shape),
                "dtype": name_of(p.dtype),
                "slots": {slot: codec.describe() for slot, codec in codecs.items()} if state else {},
                "parts": {part: name_of(value.dtype) for part, value in state.items() if isinstance(value, Tensor)},
            }
    recipes = [{**recipe, "params": list(group)} for recipe, group in zip(described, names)]
    return {"format": FORMAT, "torch": torch.__version__, "recipes": recipes, "parameters": parameters}


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
