"""AdamW and Adam: direction from two exponential moving averages. They differ in their decay add-on alone."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from shardopt.asks import Asking, Slot, together
from shardopt.rules.base import Hyper, Rule, check, check_betas
from shardopt.rules.math import adam_direction


@dataclass(frozen=True, kw_only=True)
class AdamW(Rule):
    """Adam (arXiv 1412.6980) with whatever decay the recipe adds (decoupled: AdamW, arXiv 1711.05101).

    exp_avg    = beta1 exp_avg + (1 - beta1) g
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) g^2
    u          = exp_avg / (sqrt(exp_avg_sq / (1 - beta2^t)) + eps)
    p         -= lr / (1 - beta1^t) u

    nesterov: exp_avg is replaced by beta1 exp_avg + (1 - beta1) g in u. atan2: no eps (arXiv 2407.05872).
    bias_correction=False: both corrections are 1. betas[0] = 0: no exp_avg at all, u from g.
    Slots: exp_avg (signed), exp_avg_sq. Asks nothing.
    """

    name: ClassVar[str] = "adamw"
    numbers: ClassVar[tuple[str, ...]] = ("lr", "betas", "eps")
    lr: Any = 1e-3
    betas: Any = (0.9, 0.999)
    eps: Any = 1e-8
    bias_correction: bool = True
    atan2: bool = False
    nesterov: bool = False

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check("eps", self.eps, 0.0)
        check_betas(self.betas)

    @property
    def has_momentum(self) -> bool:
        return isinstance(self.betas[0], Tensor) or self.betas[0] > 0

    def structure(self) -> list[str]:
        return [] if self.has_momentum else ["no_momentum"]

    def slots(self) -> tuple[Slot, ...]:
        second = Slot("exp_avg_sq", signed=False)
        return (Slot("exp_avg"), second) if self.has_momentum else (second,)

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        beta1, beta2 = h.betas
        second = s.exp_avg_sq.recur(beta2, (g * g).mul_(1 - beta2))
        if self.has_momentum:
            m, v = yield from together(s.exp_avg.recur(beta1, g * (1 - beta1)), second)
            if self.nesterov:
                m = m * beta1 + g * (1 - beta1)
        else:
            (v,) = yield from together(second)
            m, beta1 = g, 0.0
        bias1, bias2 = (h.unbias(beta1), h.unbias(beta2)) if self.bias_correction else (1.0, 1.0)
        return adam_direction(m, v, bias2, h.eps, self.atan2), h.lr / bias1
