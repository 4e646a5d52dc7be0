"""Steps whatever has a twin with native kernels: one call for all parameters of a key."""

import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.kernels import cpu, cuda
from shardopt.kernels.bucket import Bucket
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.call import Call
from shardopt.kernels.key import Key, check_recipe, key_of
from shardopt.kernels.passes import AskingCall, Buckets
from shardopt.kernels.replay import Above, Prelude, Replay, Taken, facts_of
from shardopt.kernels.spans import Shape, parts_of, shape_of
from shardopt.kernels.survey import Survey, possible
from shardopt.kernels.twins import NoTwin
from shardopt.spelling import first_of
from shardopt.telling import tell

OFF = os.environ.get("SHARDOPT_FUSED") == "0"  # for machines whose compiler must not be used
SAID: set[str] = set()
WIDEST_GPU = 2048  # elements of a block: 211 registers; half of it where columns are summed too: 223


class Found(NamedTuple):
    """What one parameter runs with."""

    key: Key
    step: Any
    shape: Shape


class Native:
    """The kernels of one optimizer.

    required: fused=True, so that a parameter without a kernel is an error. Of the last full step: calls; stepped and
    left, how many parameters they stepped and how many were left to the reference; asked, how many of the former ask.
    """

    def __init__(self, required: bool = False) -> None:
        self.required = required
        self.calls: list[Call] = []
        self.stepped = self.left = self.asked = 0
        self.buckets = Buckets()
        self.replay: Replay | None = None
        self.prelude: Prelude | None = None  # of the step under way, if it has one and kernels surveyed for it
        self.fresh = False  # whether `calls` are those of the step under way
        self.alone: tuple[Sequence[Any], Sequence[Call]] = (), ()  # of the step under way: items and what steps them
        self.asking: list[tuple[Sequence[Any], Sequence[AskingCall]]] = []  # the same, bucket by bucket
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
                raise ValueError(refusal({str(why): []})) from None

    def step(
        self,
        items: Sequence[Any],
        others: Sequence[Any],
        totals: Mapping[str, Tensor],
        policy: Any,
        taken: Tensor | None = None,
    ) -> list[Any]:
        """Step what has a kernel; returns the items that have none, in order. others: those that ask, which `passes`
        steps; taken: 0-d bool on the device, False: nothing is written. ValueError, before anything is written, where
        kernels are required."""
        before = prologue(policy)
        calls: dict[Any, Call] = {}
        left: list[Any] = []
        gradients: list[Tensor] = []
        self.prepare([*items, *others], before)
        self.buckets.begin()
        for item in items:
            found = self.find(item, before)
            if isinstance(found, str):
                left.append(item)
                continue
            place = found.key.cpp, item.p.device
            if place not in calls:
                calls[place] = Call(found.key.cpp, found.step)
            calls[place].add(item, found.key, found.shape, len(gradients))
            gradients.append(item.grad.contiguous())
        refused = [*left, *(item for item in others if isinstance(self.find(item, before), str))]
        if self.required and refused:
            reasons: dict[str, list[str]] = {}
            for item in refused:
                reasons.setdefault(str(self.find(item, before)), []).append(item.layout.name)
            raise ValueError(refusal(reasons))
        numbers = {**totals, "grad_scale": policy.grad_scale}
        addresses = np.array([gradient.data_ptr() for gradient in gradients], dtype=np.int64)
        for call in calls.values():
            call.close()
            call.run(addresses, numbers, taken)
        self.calls, self.stepped, self.left = list(calls.values()), len(gradients), len(refused)
        self.asked, self.fresh = 0, True
        self.alone, self.asking = (items, self.calls[:]), []
        return left

    def passes(
        self, bucket: Sequence[Any], totals: Mapping[str, Tensor], policy: Any, taken: Tensor | None = None
    ) -> tuple[list[Asking], list[int]]:
        """The steps of a bucket of what asks, one for all members that share a kernel, as `shardopt.engine.drive` wants
        them; and the positions of the members that have none."""
        before = prologue(policy)
        calls, left = self.buckets.calls(bucket, [self.find(item, before) for item in bucket])
        gradients = [item.grad.contiguous() for item in bucket]
        addresses = np.array([gradient.data_ptr() for gradient in gradients], dtype=np.int64)
        numbers = {**totals, "grad_scale": policy.grad_scale}
        self.asking.append((bucket, calls))
        self.calls += calls
        self.stepped += len(bucket) - len(left)
        self.asked += len(bucket) - len(left)
        return [call.stepping(addresses, numbers, gradients, taken) for call in calls], left

    def survey(
        self, items: Sequence[Any], shares: Sequence[Any], meshes: Sequence[Any], policy: Any
    ) -> tuple[list[Tensor], Tensor] | None:
        """This rank's part of what is asked in front of the rules, see `shardopt.prelude`; None where the reference
        must look. Kept for `again`."""
        gradients = [item.grad.contiguous() for item in items]
        if OFF or not possible(gradients, shares):
            return None
        try:
            survey = Survey(gradients, shares)
        except NoCompiler as why:
            say(str(why))
            return None
        self.prelude = Prelude(survey, shares, meshes)
        return survey.run(np.array([g.data_ptr() for g in gradients], dtype=np.int64), policy)

    def remember(
        self, items: Sequence[Any], groups: Sequence[Any], recipes: Sequence[Any], states: Any, policy: Any
    ) -> None:
        """Keep the step just taken, of all these items, for `again`, if kernels did all of it."""
        known = self.prelude is not None or not has_prelude(recipes, policy)
        standing = all(
            len({call.out.device for call in calls}) == 1 and all(call.standing for call in calls)
            for _, calls in self.asking
        )
        if self.fresh and known and standing and self.stepped == len(items):
            at = {id(item): i for i, item in enumerate(items)}
            buckets = [
                Bucket(calls, [item.layout for item in bucket], [at[id(item)] for item in bucket])
                for bucket, calls in self.asking
            ]
            alone, calls = self.alone
            last = Taken(self.prelude, [at[id(item)] for item in alone], calls, buckets)
            replay = Replay(groups, states, facts_of(groups, recipes, policy), last)
            self.replay = replay if replay.possible else None
        self.fresh, self.prelude, self.alone, self.asking = False, None, ((), ()), []

    def again(
        self, groups: Sequence[Any], recipes: Sequence[Any], states: Any, policy: Any, above: Above
    ) -> tuple[Tensor | None] | None:
        """Take the last step again, with the gradients and numbers of now; None where it must be looked at anew.

        Returns (whether the step was taken,), as `shardopt.prelude.agreed` has it.
        """
        replay, self.replay = self.replay, None  # a step that raises is not taken again
        self.fresh, self.prelude = False, None  # nor is what it left
        if replay is None:
            return None
        taken = replay.run(groups, states, facts_of(groups, recipes, policy), policy, above)
        self.replay = None if taken is None else replay
        return taken

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
        if not isinstance(found, str) and item.p.numel() and not (item.p.data_ptr() and item.grad.data_ptr()):
            return "a parameter or its gradient wraps other tensors"
        return found

    def look(self, item: Any, before: tuple[str, ...]) -> Found:
        key = key_of_item(item, before)
        parts = parts_of(item.codecs, item.layout)
        step = self.load(key, item.p.device)
        shape = shape_of(item.layout.geo, key, parts, item.p.element_size(), item.grad.element_size(), step.cut)
        return Found(key, step, shape)

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


def has_prelude(recipes: Sequence[Any], policy: Any) -> bool:
    """Whether something is asked of all gradients before the rules."""
    return policy.nonfinite == "skip" or any(addon.before_round for recipe in recipes for addon in recipe.addons)


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
    across = tuple(slot for slot, codec in codecs.items() if layout.geo.straddles(getattr(codec, "block", 1)))
    key = key_of(recipe, tuple(codecs.items()), *dtypes, before, len(layout.geo.view) > 1, across)
    widest = WIDEST_GPU // 2 if key.factored else WIDEST_GPU
    if device.type == "cuda" and max(key.blocks, default=0) > widest:
        beside = " beside the columns of a factored slot" if key.factored else ""
        raise NoTwin(f"blocks of more than {widest} elements do not fit a GPU's registers{beside}")
    return key


def say(reason: str) -> None:
    """A machine that cannot compile is told of once a process."""
    if reason not in SAID:
        SAID.add(reason)
        tell(
            f"shardopt steps on the PyTorch reference: {reason}. The results are the same, the steps slower; "
            "fused=False chooses this without a warning"
        )


def refusal(reasons: Mapping[str, Sequence[str]]) -> str:
    """reasons: why there is no kernel -> the names of the parameters for which there is none."""
    told = (f"{why} ({first_of(names)})" if names else why for why, names in reasons.items())
    return f"fused=True, but {'; '.join(told)}. Use fused=None, which runs the reference there, or another recipe"
