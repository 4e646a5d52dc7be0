"""Lion: the sign of an interpolated momentum."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from shardopt.asks import Asking, Slot
from shardopt.rules.base import Hyper, Rule, check, check_betas


@dataclass(frozen=True, kw_only=True)
class Lion(Rule):
    """Lion (arXiv 2302.06675).

    c       = beta1 exp_avg + (1 - beta1) g          the OLD exp_avg
    exp_avg = beta2 exp_avg + (1 - beta2) g
    u       = sign(c)                                sign(0) = 0
    p      -= lr u

    Slots: exp_avg (signed). Asks nothing.
    """

    name: ClassVar[str] = "lion"
    numbers: ClassVar[tuple[str, ...]] = ("lr", "betas")
    sign_like: ClassVar[bool] = True
    lr: Any = 1e-4
    betas: Any = (0.9, 0.99)

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check_betas(self.betas)

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("exp_avg"),)

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        beta1, beta2 = h.betas
        old = yield from s.exp_avg.read()
        u = (old * beta1 + g * (1 - beta1)).sign_()
        del old
        yield from s.exp_avg.recur(beta2, g * (1 - beta2))
        return u, h.lr
