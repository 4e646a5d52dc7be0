"""Adafactor with the options of torch, Hugging Face and adafactor8bit; factoring is its codec, not its maths."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Mean, Slot
from shardopt.ieee import sqrt
from shardopt.rules.base import Hyper, Rule, check
from shardopt.rules.math import clip_rms
from shardopt.spelling import choice


@dataclass(frozen=True, kw_only=True)
class Adafactor(Rule):
    """Adafactor (arXiv 1804.04235).

    rho   = min(lr, 1/sqrt(t)) if relative_step else lr
    alpha = rho max(eps[1], RMS(p)) if scale_parameter else rho
    w     = t^beta2_decay, or 1 - beta2 where beta2 is given
    exp_avg_sq = (1 - w) exp_avg_sq + w g^2          factored codec: row and column means of it
    q     = 1 / sqrt(max(exp_avg_sq, eps[0]^2))
    u     = clip(g q) ; clip(x) = x / max(1, RMS(x)/d)     d = 0: no clip
    p    -= alpha u + k weight_decay p

    beta1 > 0: momentum="update" (the paper, HF, T5): exp_avg = beta1 exp_avg + (1 - beta1) clip(g q), u = exp_avg;
    momentum="raw" (adafactor8bit's factored path): exp_avg is the EMA of g, u = clip(exp_avg q). exp_avg holds no
    learning rate (HF keeps alpha u in it): the same at constant alpha, and schedules act at once.
    bias_correction (with beta2): u *= sqrt(1 - beta2^t), and with beta1 u /= 1 - beta1^t.
    decay: k of the decoupled decay: "torch" lr, "scaled" alpha (HF; adafactor8bit's default), "decoupled" rho.
    eps_mode: "clamp" (torch): mean(row) at least eps[0], exp_avg_sq at least eps[0]^2; eps[0] None is the epsilon
    of the parameter's dtype. "add" (the paper, HF): eps[0] (None: 1e-30) is added to g^2.

    | here | torch.optim.Adafactor | transformers.Adafactor | adafactor8bit |
    |---|---|---|---|
    | lr | lr | lr | lr |
    | beta2_decay -0.8 | beta2_decay | decay_rate | beta2_decay |
    | beta2 | - | - | beta2 |
    | beta1 | - | beta1 | beta1 |
    | eps (None, 1e-3) | eps | eps | eps1, eps2 |
    | d | d | clip_threshold | clip_threshold |
    | relative_step | always on | relative_step | relative_step |
    | scale_parameter | always on | scale_parameter | scale_parameter |
    | decay "torch" / "scaled" / "decoupled" | "torch" | "scaled" | scale_weight_decay on: "scaled", off: "decoupled" |

    Slots: exp_avg (signed, with beta1), exp_avg_sq. Asks: what the codec of exp_avg_sq asks; then RMS(g q) and
    RMS(p) in one round. Matrices and vectors equal torch; torch factors the LAST two dims of a convolution, here
    its (shape[0], rest) view.
    """

    name: ClassVar[str] = "adafactor"
    asks: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("lr", "beta2_decay", "beta2", "beta1", "eps", "d")
    of_state: ClassVar[tuple[str, ...]] = ("momentum",)  # exp_avg is of updates or of gradients
    lr: Any = 1e-2
    beta2_decay: float = -0.8
    beta2: float | None = None
    beta1: float | None = None
    eps: Any = (None, 1e-3)
    d: float = 1.0
    relative_step: bool = True
    scale_parameter: bool = True
    momentum: str = "update"
    bias_correction: bool = False
    decay: str = "torch"
    eps_mode: str = "clamp"

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check("beta2_decay", self.beta2_decay, -1e9, 0.0)
        check("beta2", self.beta2, 0.0, 1.0, open_high=True, optional=True)
        check("beta1", self.beta1, 0.0, 1.0, open_high=True, optional=True)
        check("eps[0]", self.eps[0], 0.0, optional=True)
        check("eps[1]", self.eps[1], 0.0)
        check("d", self.d, 0.0)
        for name, allowed in (
            ("momentum", ("update", "raw")),
            ("decay", ("torch", "scaled", "decoupled")),
            ("eps_mode", ("clamp", "add")),
        ):
            choice(name, getattr(self, name), allowed)
        if self.bias_correction and self.beta2 is None:
            raise ValueError(
                "bias_correction needs a fixed beta2: t^beta2_decay overwrites the state at t = 1 by itself"
            )
        if self.beta2 is not None and not self.d and not self.bias_correction:
            raise ValueError(
                f"beta2={self.beta2} with d=0 makes the first step 1/sqrt(1 - beta2) times too long; "
                "give d > 0 or bias_correction=True"
            )

    def options_of(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """What is called momentum elsewhere is a number, also where a scheduler wrote it."""
        found = super().options_of(saved)
        return {name: x for name, x in found.items() if name != "momentum" or isinstance(x, str)}

    def structure(self) -> list[str]:
        words = [word for word, on in (("beta1", self.beta1), ("beta2", self.beta2), ("unclipped", not self.d)) if on]
        return words

    def slots(self) -> tuple[Slot, ...]:
        second = Slot("exp_avg_sq", signed=False)
        return (Slot("exp_avg"), second) if self.beta1 else (second,)

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        mean_floor, floor, added = self.epsilons(h)
        rho = self.rho(h)
        w = h.t**h.beta2_decay if self.beta2 is None else 1 - h.beta2
        v = yield from s.exp_avg_sq.recur(1 - w, (g * g).add_(added).mul_(w), floor=mean_floor)
        x = g
        if self.beta1 and self.momentum == "raw":
            x = yield from s.exp_avg.recur(h.beta1, g * (1 - h.beta1))
        u = x / sqrt(v.clamp(min=floor))
        del v, x
        alpha = rho
        asks = ([Mean(u * u)] if self.d else []) + ([Mean(p * p)] if self.scale_parameter else [])
        if asks:
            answers = list((yield tuple(asks)))
            del asks
            if self.d:
                u = clip_rms(u, answers.pop(0), h.d)
            if self.scale_parameter:
                alpha = rho * answers.pop(0).sqrt().clamp(min=h.eps[1])
        if self.beta1 and self.momentum == "update":
            u = yield from s.exp_avg.recur(h.beta1, u * (1 - h.beta1))
        step = alpha
        if self.bias_correction:
            step = step * h.unbias(h.beta2).sqrt()
            if self.beta1:
                step = step / h.unbias(h.beta1)
        return u, step, {"torch": h.lr, "scaled": alpha, "decoupled": rho}[self.decay]

    def rho(self, h: Hyper) -> Any:
        if not self.relative_step:
            return h.lr
        return torch.clamp(h.t**-0.5, max=h.lr)

    def epsilons(self, h: Hyper) -> tuple[float, float, float]:
        """(smallest mean(row), smallest exp_avg_sq, what is added to g^2)."""
        first = h.eps[0]
        if self.eps_mode == "clamp":
            first = torch.finfo(h.dtype).eps if first is None else first
            return max(first, 1e-30), max(first**2, SMALLEST), 0.0
        return 1e-30, SMALLEST, (1e-30 if first is None else first)


SMALLEST = torch.finfo(torch.float32).tiny
