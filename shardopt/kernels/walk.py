"""What a repeated step compares with the last one, object by object: parameters, gradients and states."""

from collections.abc import Sequence
from itertools import chain
from operator import is_
from typing import Any

import numpy as np
import torch


class Walk:
    """Where everything lay when a step was taken."""

    def __init__(self, groups: Sequence[Any], states: Any) -> None:
        """groups: the optimizer's param groups."""
        self.parameters = [p for group in groups for p in group["params"]]
        self.stepped = [p for p in self.parameters if p.grad is not None]
        self.idle = [p for p in self.parameters if p.grad is None]
        self.states = list(dict.values(states))
        self.parts = list(chain.from_iterable(map(dict.values, self.states)))
        self.held = [getattr(part, "_local_tensor", part) for part in self.parts]
        self.homes = [local.data_ptr() for local in self.held]
        self.sharded = [part for part in self.parts if hasattr(part, "_local_tensor")]
        self.shards = [part._local_tensor for part in self.sharded]
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

    def run(self, groups: Sequence[Any], states: Any) -> np.ndarray | None:
        """Addresses of the gradients, int64; None where something is not as it was."""
        if not same([p for group in groups for p in group["params"]], self.parameters):
            return None
        pointers = self.pointers() if self.kept(states) else None
        if pointers is None:
            return None
        addresses = np.array(pointers, dtype=np.int64)
        return addresses if addresses[self.filled].all() else None

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
        """Whether the states are the same tensors where they were."""
        if len(self.states) != dict.__len__(states) or not all(map(is_, dict.values(states), self.states)):
            return False
        if not same(list(chain.from_iterable(map(dict.values, self.states))), self.parts):
            return False
        with torch._C.DisableTorchFunctionSubclass():
            there = same([part._local_tensor for part in self.sharded], self.shards)
            return there and [local.data_ptr() for local in self.held] == self.homes


def same(these: Sequence[Any], those: Sequence[Any]) -> bool:
    """The very same objects."""
    return len(these) == len(those) and all(map(is_, these, those))
