"""Steps whatever has a twin with native kernels: one call for all parameters of a key."""

import os
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels import cpu, cuda
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.call import Call
from shardopt.kernels.key import Key, check_recipe, key_of
from shardopt.kernels.replay import Replay, facts_of
from shardopt.kernels.spans import Part, Shape, shape_of
from shardopt.kernels.twins import NoTwin
from shardopt.state import part_specs

OFF = os.environ.get("SHARDOPT_FUSED") == "0"  # for machines whose compiler must not be used
SAID: set[str] = set()
WIDEST_GPU = 2048  # elements of a block: 211 registers


class Found(NamedTuple):
    """What one parameter runs with."""

    key: Key
    step: Any
    shape: Shape


class Native:
    """The kernels of one optimizer.

    required: fused=True, so that a parameter without a kernel is an error. Of the last full step: calls; stepped and
    left, how many parameters they stepped and how many were left to the reference.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.calls: list[Call] = []
        self.stepped = self.left = 0
        self.replay: Replay | None = None
        self.found: dict[Any, tuple[Found | str, Any]] = {}

    @classmethod
    def chosen(cls, fused: bool | None) -> "Native | None":
        """What the argument `fused` asks for."""
        return None if fused is False else cls(required=bool(fused))

    def accept(self, recipe: Any) -> None:
        """ValueError where kernels are required and the recipe cannot have any."""
        try:
            check_recipe(recipe)
        except NoTwin as why:
            if self.required:
                raise ValueError(refusal({str(why): None})) from None

    def step(
        self,
        items: Sequence[Any],
        others: Sequence[Any],
        totals: Mapping[str, Tensor],
        policy: Any,
        taken: Tensor | None = None,
    ) -> list[Any]:
        """Step what has a kernel; returns the items that have none, in order. others: those that ask, for which there
        are no kernels; taken: 0-d bool on the device, False: nothing is written. ValueError, before anything is
        written, where kernels are required."""
        before = prologue(policy)
        calls: dict[str, Call] = {}
        left: list[Any] = []
        gradients: list[Tensor] = []
        self.prepare(items, before)
        for item in items:
            found = self.find(item, before)
            if isinstance(found, str):
                left.append(item)
                continue
            if found.key.cpp not in calls:
                calls[found.key.cpp] = Call(found.key.cpp, found.step)
            calls[found.key.cpp].add(item, found.key, found.shape, len(gradients))
            gradients.append(item.grad.contiguous())
        if self.required and (left or others):
            raise ValueError(refusal(dict.fromkeys(str(self.find(item, before)) for item in (*left, *others))))
        numbers = {**totals, "grad_scale": policy.grad_scale}
        addresses = np.array([gradient.data_ptr() for gradient in gradients], dtype=np.int64)
        for call in calls.values():
            call.close()
            call.run(addresses, numbers, taken)
        self.calls, self.stepped, self.left = list(calls.values()), len(gradients), len(left) + len(others)
        return left

    def remember(self, groups: Sequence[Any], recipes: Sequence[Any], states: Any, policy: Any) -> None:
        """Keep the step just taken for `again`, if kernels did all of it."""
        facts = facts_of(groups, recipes, policy)
        took_part = sum(p.grad is not None for group in groups for p in group["params"])
        self.replay = None
        if facts is not None and self.stepped == took_part:
            replay = Replay(groups, states, facts, self.calls)
            self.replay = replay if replay.possible else None

    def again(self, groups: Sequence[Any], recipes: Sequence[Any], states: Any, policy: Any) -> bool:
        """Take the last step again, with the gradients and numbers of now; False where it must be looked at anew."""
        return self.replay is not None and self.replay.run(groups, states, facts_of(groups, recipes, policy))

    @property
    def ran(self) -> list[str]:
        """The C++ types of the last step's kernels."""
        return [call.cpp for call in self.calls]

    def prepare(self, items: Sequence[Any], before: tuple[str, ...]) -> None:
        """Compile for all parameters that are met for the first time side by side; `find` reports what fails."""
        keys = []
        for item in items:
            if self.place(item, before) not in self.found and item.p.device.type == "cpu":
                with suppress(NoTwin):
                    keys.append(key_of_item(item, before))
        if len(set(keys)) > 1:
            with suppress(NoCompiler):
                cpu.prepare(keys)

    def place(self, item: Any, before: tuple[str, ...]) -> Any:
        """Under which a parameter's kernel is remembered."""
        maximize = bool(item.group.get("maximize"))
        return id(item.layout), id(item.recipe), item.p.dtype, item.grad.dtype, before, maximize, item.p.device

    def find(self, item: Any, before: tuple[str, ...]) -> Found | str:
        """The kernel of one parameter, compiled if it has to be, or why it has none."""
        at = self.place(item, before)
        if at not in self.found:
            found: Found | str
            try:
                found = self.look(item, before)
            except NoTwin as why:
                found = str(why)
            except NoCompiler as why:
                found = str(why)
                say(found)
            self.found[at] = found, (item.layout, item.recipe)  # kept, so that nothing else gets their ids
        found = self.found[at][0]
        if not isinstance(found, str) and not item.p.is_contiguous():
            return "a parameter is not contiguous"
        return found

    def look(self, item: Any, before: tuple[str, ...]) -> Found:
        key = key_of_item(item, before)
        parts = [
            Part(name, part.dtype.itemsize, 1 if part.dims is None else part.dims[-1][1])
            for name, part in part_specs(item.codecs, item.layout).items()
        ]
        shape = shape_of(item.layout.geo, key, parts, item.p.element_size(), item.grad.element_size())
        return Found(key, self.load(key, item.p.device), shape)

    def compiler(self, device: torch.device) -> str:
        """What compiles for a device; NoTwin or NoCompiler where nothing does. GPU kernels have not run on one yet."""
        if device.type == "cpu":
            return cpu.compiler()[1]
        if not self.required:
            raise NoTwin("kernels for GPUs are new: fused=True chooses them")
        return "NVRTC"

    def load(self, key: Key, device: torch.device) -> Any:
        """The kernel for a device."""
        self.compiler(device)
        return cpu.load(key) if device.type == "cpu" else cuda.load(key, device)


def prologue(policy: Any) -> tuple[str, ...]:
    """What every gradient goes through before the add-ons."""
    unscale = policy.grad_scale is not None
    return ("unscale",) * unscale + ("zero",) * (policy.nonfinite == "zero")


def key_of_item(item: Any, before: tuple[str, ...]) -> Key:
    """The key of one parameter's step; NoTwin with the reason."""
    if item.group.get("maximize"):
        before = (*before, "maximize")
    return key_for(item.recipe, item.codecs, item.layout, item.p.device, (item.p.dtype, item.grad.dtype), before)


def key_for(
    recipe: Any,
    codecs: Mapping[str, Any],
    layout: Any,
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    before: tuple[str, ...] = (),
) -> Key:
    """The key of a parameter's step, dtypes being those of parameter and gradient. NoTwin with the reason."""
    if OFF:
        raise NoTwin("SHARDOPT_FUSED=0 switches kernels off")
    if device.type not in ("cpu", "cuda"):
        raise NoTwin(f"there are no kernels for {device.type}")
    key = key_of(recipe, tuple(codecs.items()), *dtypes, before)
    if device.type == "cuda" and max(key.blocks, default=0) > WIDEST_GPU:
        raise NoTwin(f"blocks of more than {WIDEST_GPU} elements do not fit a GPU's registers")
    if any(codec.asks(layout.geo) for codec in codecs.values()):
        raise NoTwin("blocks lie on several ranks")
    return key


def say(reason: str) -> None:
    """A machine that cannot compile is told of once a process."""
    if reason not in SAID:
        SAID.add(reason)
        warnings.warn(
            f"shardopt steps on the PyTorch reference: {reason}. The results are the same, the steps slower; "
            "fused=False chooses this without a warning",
            stacklevel=5,
        )


def refusal(reasons: Mapping[str, Any]) -> str:
    return f"fused=True, but {'; '.join(reasons)}. Use fused=None, which runs the reference there, or another recipe"
