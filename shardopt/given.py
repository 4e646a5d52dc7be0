"""What users give as parameters and as learning rate, checked with words where torch.optim has none."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from shardopt.dtensor.lazy import local_device


def listed(params: Any) -> Any:
    """The argument `params` as a list; ValueError where nothing is in it, TypeError for a module."""
    if isinstance(params, nn.Module):
        raise TypeError(f"params is the module {type(params).__name__}; give its parameters, as model.parameters()")
    if isinstance(params, Mapping):
        raise TypeError("params is a mapping; give its items, as model.named_parameters(), or a list of param groups")
    if isinstance(params, (Tensor, str)) or not isinstance(params, Iterable):
        return params  # torch refuses them
    found = list(params)
    if not found:
        read = ", or something read it before: it can be read only once" if isinstance(params, Iterator) else ""
        raise ValueError(f"optimizer got an empty parameter list: {type(params).__name__} held none{read}")
    return found


def check_apart(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """ValueError where a parameter of a new group is twice in it (torch warns), or in a group that is there."""
    held = {id(p): i for i, other in enumerate(groups) for p in other["params"]}
    names: dict[int, str] = {}
    params = group["params"]
    for j, given in enumerate([params] if isinstance(params, Tensor) else params):
        name, p = given if isinstance(given, tuple) else (f"params[{j}]", given)
        what = f"{name}, of shape {tuple(getattr(p, 'shape', ()))},"
        if id(p) in held:
            raise ValueError(
                f"{what} of a new param group appears in more than one parameter group: it is in param group "
                f"{held[id(p)]} already. Leave it out of one of them"
            )
        if id(p) in names:
            raise ValueError(
                f"{what} appears twice in one param group, before as {names[id(p)]}: it would be stepped twice. Tied "
                "weights are one parameter; model.parameters() gives it once"
            )
        names[id(p)] = name


def check_rate(what: str, lr: Any, params: Iterable[Tensor]) -> None:
    """ValueError unless lr is a number, or a tensor of one number on the CPU or where the parameters are."""
    if lr is None or isinstance(lr, str):
        raise ValueError(f"{what} has lr {lr!r}; it must be a number or a tensor")
    if not isinstance(lr, Tensor):
        return
    if lr.numel() != 1:
        raise ValueError(
            f"{what} has an lr tensor of shape {tuple(lr.shape)}; it must hold one number, as torch.tensor(1e-3). Give "
            "parameters with other rates groups of their own"
        )
    devices = {local_device(p) for p in params}
    if lr.device.type == "meta" or (lr.device.type != "cpu" and devices - {lr.device}):
        others = ", ".join(sorted(str(device) for device in devices))
        raise ValueError(
            f"{what} has an lr tensor on {lr.device} and parameters on {others}; put it on the CPU or on their device"
        )


def check_first_rate(what: str, lr: Any) -> None:
    """ValueError for a tensor of several numbers; for a negative rate, or a NaN, in one that can be read without
    waiting."""
    if isinstance(lr, Tensor) and lr.numel() != 1:
        check_rate(what, lr, ())
    if type(lr) is Tensor and lr.device.type == "cpu" and not lr.item() >= 0:
        raise ValueError(f"{what} has lr {lr.item()}; it must be in [0.0, inf]")
