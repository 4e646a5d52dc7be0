"""MARS: a gradient whose noise is reduced by the gradient before it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.addons.base import Addon
from shardopt.asks import Asking, Slot, Sum
from shardopt.rules.base import Hyper, check


@dataclass(frozen=True, kw_only=True)
class Mars(Addon):
    """Noise reduced by the last gradient (MARS, arXiv 2411.10438, and MARS-M, arXiv 2510.21800).

    c = g + gamma beta / (1 - beta) (g - last_grad) ; last_grad = g ; g <- c / max(1, ||c||)

    The approximate form: last_grad is the gradient of the step before, not of this batch at the old weights. The
    first step has g itself. beta: the rule's betas[0], beta1 or momentum. clip=False: no division by the norm. Slot:
    last_grad (signed). Asks one norm.
    """

    name: ClassVar[str] = "mars"
    stage: ClassVar[str] = "gradient"
    order: ClassVar[int] = 4
    asks: ClassVar[bool] = True
    gamma: float = 0.025
    clip: bool = True

    def __post_init__(self) -> None:
        check("gamma", self.gamma, 0.0)

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("last_grad"),)

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        beta = beta_of(h)
        last = yield from s.last_grad.read()
        s.last_grad.set(g)
        c = g + torch.where(h.t == 1, 0.0, g - last) * (self.gamma * beta / (1 - beta))
        if self.clip:
            c = c / (yield Sum(c * c)).sqrt().clamp(min=1.0)
        return c

    def key(self) -> str:
        return self.name if self.clip else f"{self.name}.unclipped"


def beta_of(numbers: Any) -> Any:
    """The decay of the first moment among a rule's numbers or a param group's; None where there is none."""
    for name in ("betas", "beta1", "momentum"):
        if hasattr(numbers, name):
            value = getattr(numbers, name)
            return value[0] if name == "betas" else value
    return None
