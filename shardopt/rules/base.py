"""What every rule is: an update as one generator, its slots and its hyper-parameters; never storage, ranks, add-ons."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Slot, Wire


class Hyper:
    """What a rule and its add-ons read in one step: the numbers of the param group, and these.

    t: 0-d float64 on the parameter's device, the number of the step being taken (the first is 1).
    shape: GLOBAL view of the parameter. dtype: the parameter's. totals: answers to what add-ons asked of all
    parameters, by add-on name. lr and every other number of the group are attributes by their names.
    """

    lr: Any
    betas: Any
    eps: Any
    t: Tensor
    weight_decay: Any
    dtype: torch.dtype

    def __init__(self, group: dict[str, Any], **more: Any) -> None:
        self.__dict__.update(group)
        self.__dict__.update(more)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"the param group has no {name!r}, which its recipe reads")

    def unbias(self, beta: Any) -> Tensor:
        """Bias correction 1 - beta^t of an EMA that began at zero, 0-d float64, from the step on the device."""
        return 1 - beta**self.t


@dataclass(frozen=True, kw_only=True)
class Rule:
    """An update rule. Subclasses are frozen; numbers are defaults of the param group, the rest is structure.

    `update(p, g, s, h)`: p, g fp32 in the parameter's local view (p read-only), s the slots, h a `Hyper`. Returns
    (u, step): the direction before the learning rate and the scalar it is multiplied by; optionally a third, the
    factor of the decay terms where that is not lr.
    """

    name: ClassVar[str]
    numbers: ClassVar[tuple[str, ...]] = ()  # the fields that live in param groups
    of_state: ClassVar[tuple[str, ...]] = ()  # the switches that give stored state its meaning
    aliases: ClassVar[tuple[str, ...]] = ()  # other names of switches in param groups: see `given`
    asks: ClassVar[bool] = False  # whether update asks anything itself (its codecs aside)
    sign_like: ClassVar[bool] = False  # |u| is 1 by nature: clipping its RMS would do nothing

    def slots(self) -> tuple[Slot, ...]:
        return ()

    def formats(self) -> tuple[str, ...]:
        """Codecs that the rule itself names (of what travels), to be checked."""
        return ()

    def unfit(self, view: tuple[int, ...]) -> str | None:
        """Why the update is not defined on a parameter of this GLOBAL view, if it is not."""
        return None

    def whole(self, view: tuple[int, ...]) -> tuple[Any, Wire, str] | None:
        """(work, wire, mode) of the `Whole` that update will ask for a parameter of this GLOBAL view."""
        return None

    def details(self, views: Collection[tuple[int, ...]]) -> dict[str, str]:
        """What `explain()` tells of the options for parameters of these GLOBAL views: title -> words."""
        return {}

    def caveat(self) -> str | None:
        """What whoever reads `explain()` must know of these options."""
        return None

    def stepped(self, group: dict[str, Any]) -> None:
        """Called once a step was taken, for rules that count in numbers of their group."""

    def defaults(self) -> dict[str, Any]:
        """Numbers for the param group."""
        return {name: getattr(self, name) for name in self.numbers}

    def switches(self) -> list[str]:
        """The fields that are structure. A checkpoint's are compared with these, never adopted."""
        return [field.name for field in fields(self) if field.name not in self.numbers]

    def given(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """The switches that a user's param group sets, in this rule's words."""
        return {name: group[name] for name in self.switches() if name in group}

    def options_of(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """The switches that a saved param group tells of, one of torch.optim's too, in this rule's words."""
        return {name: saved[name] for name in self.switches() if name in saved}

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        raise NotImplementedError

    def key(self) -> str:
        """Name and structure, without numbers: `sgd.nesterov`."""
        words = [self.name]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in self.numbers and value != field.default:
                words.append(field.name if value is True else f"{field.name}={value}")
        return ".".join(words + self.structure())

    def structure(self) -> list[str]:
        """Words for the key where a NUMBER decides which slots there are (a momentum of 0 has none)."""
        return []


def check(
    name: str,
    value: Any,
    low: float,
    high: float = float("inf"),
    *,
    open_high: bool = False,
    optional: bool = False,
) -> None:
    """A ValueError unless low <= value <= high (value < high if open_high). Tensors pass: reading them may wait."""
    if isinstance(value, Tensor) or (value is None and optional):
        return
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name} is {value!r}; it must be a number")
    if not (low <= value < high if open_high else low <= value <= high):
        bound = f"[{low}, {high}" + (")" if open_high else "]")
        raise ValueError(f"{name} is {value}; it must be in {bound}")


def check_betas(betas: Any, count: int = 2) -> None:
    if not isinstance(betas, (tuple, list)) or len(betas) != count:
        raise ValueError(f"betas is {betas!r}; it must have {count} numbers")
    for i, beta in enumerate(betas):
        check(f"betas[{i}]", beta, 0.0, 1.0, open_high=True)
