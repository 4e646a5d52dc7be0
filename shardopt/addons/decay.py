"""Decoupled weight decays: a term of the same p that the update sees, multiplied by lr, rounded together with it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.addons.base import Addon
from shardopt.addons.gradient import is_zero
from shardopt.asks import Asking
from shardopt.rules.base import Hyper


@dataclass(frozen=True, kw_only=True)
class WeightDecay(Addon):
    """Decoupled weight decay (arXiv 1711.05101).

    p -= lr weight_decay p
    """

    name: ClassVar[str] = "decay"
    stage: ClassVar[str] = "decay"
    excludes: ClassVar[tuple[str, ...]] = ("cautious_decay", "l2")

    def defaults(self) -> dict[str, Any]:
        return {"weight_decay": 0.0}

    def decay(self, p: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        return None if is_zero(h.weight_decay) else p * h.weight_decay
        yield


@dataclass(frozen=True, kw_only=True)
class CautiousDecay(Addon):
    """Decoupled decay only where it does not fight the update (arXiv 2510.12402).

    p -= lr weight_decay p [u p >= 0]
    """

    name: ClassVar[str] = "cautious_decay"
    stage: ClassVar[str] = "decay"
    excludes: ClassVar[tuple[str, ...]] = ("decay", "l2")

    def defaults(self) -> dict[str, Any]:
        return {"weight_decay": 0.0}

    def decay(self, p: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        return None if is_zero(h.weight_decay) else torch.where(u * p >= 0, p, 0.0).mul_(h.weight_decay)
        yield
