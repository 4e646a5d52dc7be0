"""What a step must fulfil to be captured in a CUDA graph; anything else raises before the capture is spoilt."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor


def capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def check_capture(groups: Iterable[Mapping[str, Any]], has_state: Mapping[Any, bool]) -> None:
    """ValueError unless every lr is a tensor on the device, every parameter has its state and a gradient.

    A float lr would be frozen into the graph; state and gradients that come into being later would not be in it.
    """
    for i, group in enumerate(groups):
        lr = group.get("lr")
        if not isinstance(lr, Tensor) or lr.device.type != "cuda":
            raise ValueError(
                f"param group {i} has lr {lr!r}; a captured step reads it on the device: give "
                "lr=torch.tensor(lr, device='cuda')"
            )
        for j, p in enumerate(group["params"]):
            if not p.requires_grad:
                continue
            name = group["param_names"][j] if "param_names" in group else f"param_groups[{i}].params[{j}]"
            if not has_state[p]:
                raise ValueError(
                    f"{name} has no state, and a step cannot make any while it is captured; take one step before "
                    "capturing"
                )
            if p.grad is None:
                raise ValueError(
                    f"{name} has no gradient during capture; keep gradients with zero_grad(set_to_none=False)"
                )
