"""Muon with a second moment of the orthogonal update: NorMuon (of its rows) and AdaMuon (of its elements)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Mean, Slot, Sum
from shardopt.ieee import sqrt
from shardopt.rules.base import Hyper, check
from shardopt.rules.math import clip_rms
from shardopt.rules.muon import Muon, blocks, squares
from shardopt.spelling import choice


@dataclass(frozen=True, kw_only=True)
class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491): every neuron's update gets the same size in the long run.

    o      = as in Muon
    row_sq = beta2 row_sq + (1 - beta2) mean_cols(o^2)              one number a row of the GLOBAL view
    w      = o / (sqrt(row_sq) + eps)
    p     -= lr adjust w ||o|| / ||w|| + lr weight_decay p

    Norms are of a matrix of a stack, or of a block of `split`, as if it were a parameter of its own.
    adjust_lr="rms_rescale" replaces the norm of o by 0.2 sqrt(rows cols). Slots: momentum_buffer (signed), row_sq.
    Asks one Whole, the rows' means, and the two norms together. Statistics are taken of the shards after o came back.
    """

    name: ClassVar[str] = "normuon"
    numbers: ClassVar[tuple[str, ...]] = (*Muon.numbers, "beta2", "eps")
    beta2: Any = 0.95
    eps: Any = 1e-8

    def __post_init__(self) -> None:
        super().__post_init__()
        check("beta2", self.beta2, 0.0, 1.0, open_high=True)
        check("eps", self.eps, 0.0)

    def slots(self) -> tuple[Slot, ...]:
        return (*super().slots(), Slot("row_sq", signed=False, rows=True))

    def lines(self) -> tuple[Callable[..., Asking], ...]:
        return self.sizes, self.restoring

    def sizes(self, s: Any, h: Hyper, of_o: Tensor) -> Asking:
        """What every row of o is divided by."""
        mean = yield Mean(of_o, dim=-1)
        v = yield from s.row_sq.recur(h.beta2, mean * (1 - h.beta2))
        return (sqrt(v) + h.eps).unsqueeze(-1)

    def restoring(self, s: Any, h: Hyper, of_o: Tensor, of_w: Tensor) -> Asking:
        """||o|| / ||w|| of every matrix, of every block of `split`, or what rescales w: to be multiplied with w."""
        if self.adjust_lr == "rms_rescale":
            return (yield from self.rescaling(s, h, of_w))
        if self.split is None:
            before, after = yield Sum(of_o, dim=(-2, -1)), Sum(of_w, dim=(-2, -1))
            return (before / after.clamp(min=1e-30)).sqrt().float()[..., None, None]
        of_each: Any = {"dim": (-2, -1), "blocks": blocks(self.split, h.shape[-2])}
        before, after = yield Mean(of_o, **of_each), Mean(of_w, **of_each)
        return (before / after.clamp(min=1e-30)).sqrt().unsqueeze(-1)

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        o = yield from self.orthogonal(g, s, h)
        of_o = squares(o)
        w = o / (yield from self.sizes(s, h, of_o))
        w = w * (yield from self.restoring(s, h, of_o, squares(w)))
        return w, *self.rates(h)


@dataclass(frozen=True, kw_only=True)
class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005): an Adam-like second moment of the orthogonal update.

    x          = as in Muon; its sign (sign=True: the paper)
    o          = the polar factor of x
    exp_avg_sq = beta2 exp_avg_sq + (1 - beta2) o^2                 factored codec: kaon's rule
    u          = o / (sqrt(exp_avg_sq) + eps), or atan2(o, sqrt(exp_avg_sq))
    scale="rms_rescale": u = 0.2 u / RMS(u), of a matrix or block
    scale="clip" (kaon): u = 0.2 u / max(1, RMS(u)), of the whole parameter
    p         -= lr u + lr weight_decay p

    No bias correction: the rescaling cancels it. With atan2 the source system keeps a factor 4 / pi beside the
    rescaling (RMS 0.255); here the RMS is 0.2. Slots: momentum_buffer (signed), exp_avg_sq. Asks one Whole, what the
    codec of exp_avg_sq asks, and a norm.
    """

    name: ClassVar[str] = "adamuon"
    numbers: ClassVar[tuple[str, ...]] = (*Muon.numbers, "beta2", "eps")
    beta2: Any = 0.95
    eps: Any = 1e-8
    adjust_lr: str = "none"
    sign: bool = True
    atan2: bool = False
    scale: str = "rms_rescale"

    def __post_init__(self) -> None:
        super().__post_init__()
        check("beta2", self.beta2, 0.0, 1.0, open_high=True)
        check("eps", self.eps, 0.0)
        choice("scale", self.scale, ("rms_rescale", "clip"))
        if self.adjust_lr != "none":
            raise ValueError(f"adjust_lr is {self.adjust_lr!r}, but AdaMuon's update has an RMS of its own: see scale")

    def slots(self) -> tuple[Slot, ...]:
        return (*super().slots(), Slot("exp_avg_sq", signed=False))

    def lines(self) -> tuple[Callable[..., Asking], ...]:
        return (self.rescaling,) if self.scale == "rms_rescale" else ()

    def factor(self, view: tuple[int, ...]) -> float:
        return 0.2 if self.scale == "clip" else 1.0

    def prepared(self, x: Tensor) -> Tensor:
        return torch.where(x.isnan(), x, x.sign()) if self.sign else x  # torch's sign of NaN is 0

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        o = yield from self.orthogonal(g, s, h)
        v = yield from s.exp_avg_sq.recur(h.beta2, (o * o).mul_(1 - h.beta2))
        if self.atan2:  # in float64: see adam_direction
            u = torch.atan2(o.double(), sqrt(v).double()).float()
        else:
            u = o / (sqrt(v) + h.eps)
        if self.scale == "rms_rescale":
            u = u * (yield from self.rescaling(s, h, squares(u)))
        else:
            u = clip_rms(u, (yield Mean(u * u)), 1.0)
        return u, *self.rates(h)
