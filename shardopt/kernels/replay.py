"""A step taken again with nothing but new gradients: what makes the host's share of a step small.

Everything that a step looks up is a function of things that rarely change. This compares those things by identity and
address, about half a microsecond a parameter, and gives way to the full step wherever one of them is another.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels.bucket import Bucket
from shardopt.kernels.call import Call
from shardopt.kernels.survey import Survey


class Above(NamedTuple):
    """What a step needs from above: the optimizer's `answers`, shardopt.prelude.agreed, shardopt.engine.abreast."""

    answers: Any
    agreed: Callable[..., tuple[dict[str, Tensor], Tensor | None]]
    abreast: Callable[[Iterable[Iterator[None]], Any], None]


class Prelude(NamedTuple):
    """What a step asks in front of the rules: `shares` and `meshes` of shardopt.prelude, and who looks for them."""

    survey: Survey
    shares: Sequence[Any]
    meshes: Sequence[Any]


class Taken(NamedTuple):
    """What kernels did in a step. alone: positions among the step's items of those that ask nothing, which `calls`
    step; buckets: of those that ask."""

    prelude: Prelude | None
    alone: Sequence[int]
    calls: Sequence[Call]
    buckets: Sequence[Bucket]


class Replay:
    """How the last step can be taken again."""

    def __init__(self, groups: Sequence[Any], states: Any, facts: Any, last: Taken) -> None:
        """groups: the optimizer's param groups; facts: see `facts_of`."""
        self.facts, self.last = facts, last
        self.alone = np.array(last.alone, dtype=np.int64)
        self.parameters = [p for group in groups for p in group["params"]]
        self.stepped = [p for p in self.parameters if p.grad is not None]
        self.idle = [p for p in self.parameters if p.grad is None]
        self.states = list(dict.values(states))
        self.parts = list(chain.from_iterable(map(dict.values, self.states)))
        ends = [next(reversed(state.values())) for state in self.states if state]
        self.held = [getattr(part, "_local_tensor", part) for part in ends]  # of a state that is moved all is moved
        self.homes = [part.data_ptr() for part in self.held]
        self.locals = [getattr(p, "_local_tensor", p) for p in self.stepped]
        self.addresses = [local.data_ptr() for local in self.locals]
        self.specs = [p.grad._spec for p in self.stepped if hasattr(p.grad, "_spec")]
        self.dtypes = [p.grad.dtype for p in self.stepped]
        self.sizes = [local.numel() for local in self.locals]
        self.filled = np.flatnonzero(self.sizes)  # a tensor that wraps another has no address of its own

    @property
    def possible(self) -> bool:
        """All parameters are DTensors or none is: each kind has its own way to the local tensor."""
        return len(self.specs) in (0, len(self.stepped))

    def run(
        self, groups: Sequence[Any], states: Any, facts: Any, policy: Any, above: Above
    ) -> tuple[Tensor | None] | None:
        """Take the step, unless all ranks skip it: (whether it was taken,). None, with nothing touched and nothing
        asked, where something is not as it was."""
        if facts != self.facts or not same([p for group in groups for p in group["params"]], self.parameters):
            return None
        pointers = self.pointers() if self.kept(states) else None
        if pointers is None:
            return None
        addresses = np.array(pointers, dtype=np.int64)
        if not addresses[self.filled].all():
            return None
        survey, shares, meshes = self.last.prelude or (None, (), ())
        found = survey.run(addresses, policy) if survey is not None else ((), None)
        totals, taken = above.agreed(shares, meshes, *found, above.answers, policy)
        on_host = taken is None or taken.device.type == "cpu"
        if taken is None or not on_host or bool(taken):
            numbers, flag = {**totals, "grad_scale": policy.grad_scale}, None if on_host else taken
            for call in self.last.calls:
                call.run(addresses[self.alone], numbers, flag)
            buckets = (bucket.again(addresses, numbers, flag, above.answers) for bucket in self.last.buckets)
            above.abreast(buckets, above.answers)
        return (taken,)

    def pointers(self) -> list[int] | None:
        """Addresses of the gradients; None unless they are of the kind that they were, nobody else has one, and
        parameters lie where they lay."""
        try:
            with torch._C.DisableTorchFunctionSubclass():  # else every look at a DTensor asks whether it is overridden
                gradients: list[Any] = [p.grad for p in self.stepped]
                if self.specs:
                    if [g._spec for g in gradients] != self.specs:
                        return None
                    if not same([p._local_tensor for p in self.stepped], self.locals):
                        return None
                    gradients = [g._local_tensor for g in gradients]
                found = [g.data_ptr() for g in gradients]
                alike = [g.dtype for g in gradients] == self.dtypes and [g.numel() for g in gradients] == self.sizes
                alike = alike and all([g.is_contiguous() for g in gradients])
                there = [local.data_ptr() for local in self.locals] == self.addresses
                return found if alike and there and all([p.grad is None for p in self.idle]) else None
        except (AttributeError, RuntimeError):  # none, a sparse one, one of another class
            return None

    def kept(self, states: Any) -> bool:
        """Whether the states are the same tensors, and the last of each where it was."""
        if len(self.states) != dict.__len__(states) or not all(map(is_, dict.values(states), self.states)):
            return False
        unchanged = same(list(chain.from_iterable(map(dict.values, self.states))), self.parts)
        return unchanged and list(map(Tensor.data_ptr, self.held)) == self.homes


def same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """The very same objects."""
    return len(these) == len(those) and all(map(is_, these, those))


def facts_of(groups: Sequence[Any], recipes: Sequence[Any], policy: Any) -> Any:
    """What else a step depends on, numbers of the param groups and GradScaler's aside."""
    scaled = policy.grad_scale is not None
    return policy.nonfinite, scaled, [(id(g), id(r), bool(g.get("maximize"))) for g, r in zip(groups, recipes)]
