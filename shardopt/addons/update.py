"""Add-ons that change the direction u after the rule."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.addons.base import Addon
from shardopt.asks import Asking, Mean, Sum
from shardopt.rules.base import Hyper, check
from shardopt.rules.math import clip_rms
from shardopt.spelling import choice


@dataclass(frozen=True, kw_only=True)
class Grams(Addon):
    """The size from the momentum, the sign from the gradient (arXiv 2412.17107).

    |u| sign(g)
    """

    name: ClassVar[str] = "grams"
    stage: ClassVar[str] = "direction"
    order: ClassVar[int] = 1
    excludes: ClassVar[tuple[str, ...]] = ("cautious",)

    def direction(self, p: Tensor, g: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        return u.abs().mul_(g.sign())
        yield


@dataclass(frozen=True, kw_only=True)
class RMSClip(Addon):
    """Clips the RMS of the update of a whole parameter (arXiv 1804.04235).

    u / max(1, RMS(u) / d). Asks one scalar.
    """

    name: ClassVar[str] = "rms_clip"
    asks: ClassVar[bool] = True
    stage: ClassVar[str] = "direction"
    order: ClassVar[int] = 2
    d: float = 1.0

    def __post_init__(self) -> None:
        check("d", self.d, 1e-30)

    def direction(self, p: Tensor, g: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        return clip_rms(u, (yield Mean(u * u)), self.d)


@dataclass(frozen=True, kw_only=True)
class Cautious(Addon):
    """Only the elements whose update agrees with the gradient move (arXiv 2411.16085).

    mask = [u g > 0] ; u <- u mask / max(kept / counted, floor)

    counted: the elements with a non-zero gradient; the paper counts all (count="all"), which multiplies the few
    active rows of an embedding by up to 1 / floor. The decay is not masked. Asks two counts of the parameter.
    """

    name: ClassVar[str] = "cautious"
    asks: ClassVar[bool] = True
    stage: ClassVar[str] = "direction"
    order: ClassVar[int] = 3
    excludes: ClassVar[tuple[str, ...]] = ("grams",)
    count: str = "active"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        check("floor", self.floor, 1e-30, 1.0)
        choice("count", self.count, ("active", "all"))

    def direction(self, p: Tensor, g: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        mask = u * g > 0
        kept, counted = yield Sum(mask), Sum(g != 0 if self.count == "active" else torch.ones_like(mask))
        share = (kept / counted.clamp(min=1.0)).clamp(min=self.floor)
        return u * mask / share  # a product, so that a NaN stays one
