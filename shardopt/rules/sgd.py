"""SGD and RMSprop: the rules without a normalised first moment, with torch's options."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Slot, together
from shardopt.ieee import sqrt
from shardopt.rules.base import Hyper, Rule, check


@dataclass(frozen=True, kw_only=True)
class SGD(Rule):
    """SGD with heavy ball momentum, as torch.optim.SGD.

    momentum_buffer = momentum momentum_buffer + (1 - dampening) g     the first step: g itself
    u               = momentum_buffer, or g + momentum momentum_buffer (nesterov), or g (momentum 0)
    p              -= lr u

    Slots: momentum_buffer (signed), none where momentum is 0. Asks nothing.
    """

    name: ClassVar[str] = "sgd"
    numbers: ClassVar[tuple[str, ...]] = ("lr", "momentum", "dampening")
    lr: Any = 1e-3
    momentum: Any = 0.0
    dampening: Any = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check("momentum", self.momentum, 0.0)
        if self.nesterov and (not self.momentum or self.dampening):
            raise ValueError(f"nesterov needs momentum > 0 and dampening 0; got {self.momentum} and {self.dampening}")

    def structure(self) -> list[str]:
        return ["momentum"] if self.momentum else []

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer"),) if self.momentum else ()

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        if not self.momentum:
            return g, h.lr
        x = g * torch.where(h.t == 1, 1.0, 1.0 - h.dampening) if h.dampening else g
        m = yield from s.momentum_buffer.recur(h.momentum, x)
        return (g + m * h.momentum if self.nesterov else m), h.lr


@dataclass(frozen=True, kw_only=True)
class RMSprop(Rule):
    """RMSprop (Tieleman and Hinton 2012), as torch.optim.RMSprop.

    square_avg = alpha square_avg + (1 - alpha) g^2
    grad_avg   = alpha grad_avg + (1 - alpha) g                        centered only
    u          = g / (sqrt(square_avg [- grad_avg^2]) + eps)
    momentum_buffer = momentum momentum_buffer + u ; u = momentum_buffer      momentum > 0 only
    p         -= lr u

    torch has no bias correction: the first steps are up to 1 / sqrt(1 - alpha) = 10 times too long.
    bias_correction=True divides square_avg by 1 - alpha^t (not with centered).
    Slots: square_avg, grad_avg (signed), momentum_buffer (signed). Asks nothing.
    """

    name: ClassVar[str] = "rmsprop"
    numbers: ClassVar[tuple[str, ...]] = ("lr", "alpha", "eps", "momentum")
    of_state: ClassVar[tuple[str, ...]] = ("centered",)
    lr: Any = 1e-2
    alpha: Any = 0.99
    eps: Any = 1e-8
    momentum: Any = 0.0
    centered: bool = False
    bias_correction: bool = False

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check("alpha", self.alpha, 0.0, 1.0, open_high=True)
        check("eps", self.eps, 0.0)
        check("momentum", self.momentum, 0.0)
        if self.centered and self.bias_correction:
            raise ValueError("centered and bias_correction exclude each other; drop one")

    def structure(self) -> list[str]:
        return ["momentum"] if self.momentum else []

    def slots(self) -> tuple[Slot, ...]:
        slots = [Slot("square_avg", signed=False)]
        if self.centered:
            slots.append(Slot("grad_avg"))
        if self.momentum:
            slots.append(Slot("momentum_buffer"))
        return tuple(slots)

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        recurrences = [s.square_avg.recur(h.alpha, (g * g).mul_(1 - h.alpha))]
        if self.centered:
            recurrences.append(s.grad_avg.recur(h.alpha, g * (1 - h.alpha)))
        v, *mean = yield from together(*recurrences)
        if self.bias_correction:
            v = v / h.unbias(h.alpha)
        if mean:
            # a quantised square_avg may lie below grad_avg^2 by its rounding error
            v = (v - mean[0] * mean[0]).clamp_(min=0)
        u = g / sqrt(v).add_(h.eps)
        if self.momentum:
            u = yield from s.momentum_buffer.recur(h.momentum, u)
        return u, h.lr
