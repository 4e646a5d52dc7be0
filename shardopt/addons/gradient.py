"""Add-ons that change the gradient before the rule sees it."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.addons.base import Addon
from shardopt.asks import Asking, Mean, Sum, Total
from shardopt.rules.base import Hyper, check

ROUNDING = 1e-12  # of ||g||^2: what fp32 leaves of a gradient along p is about 1e-15 of it


@dataclass(frozen=True, kw_only=True)
class CoupledDecay(Addon):
    """The L2 penalty of torch's Adam, SGD and RMSprop.

    g + weight_decay p
    """

    name: ClassVar[str] = "l2"
    stage: ClassVar[str] = "gradient"
    order: ClassVar[int] = 1

    def defaults(self) -> dict[str, Any]:
        return {"weight_decay": 0.0}

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        return g if is_zero(h.weight_decay) else g + p * h.weight_decay
        yield


@dataclass(frozen=True, kw_only=True)
class ClipByGlobalNorm(Addon):
    """Clips the 2-norm over ALL parameters whose recipe has it, whatever their groups and meshes.

    g min(1, max_norm / (||g|| + 1e-6)), the same as torch.nn.utils.clip_grad_norm_, inside the step. Asks one Total
    before any rule runs.
    """

    name: ClassVar[str] = "clip_by_global_norm"
    stage: ClassVar[str] = "gradient"
    before_round: ClassVar[bool] = True
    max_norm: float = 1.0

    def __post_init__(self) -> None:
        check("max_norm", self.max_norm, 0.0)

    def before(self, g: Tensor) -> Total:
        return Total(torch.linalg.vector_norm(g, dtype=torch.float64).square())

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Any) -> Asking:
        return g * (self.max_norm / (h.totals[self.name].sqrt() + 1e-6)).clamp(max=1.0)
        yield


@dataclass(frozen=True, kw_only=True)
class GradientCentralization(Addon):
    """Every row of a matrix loses its mean (arXiv 2004.01461): g_i - mean(g_i). Vectors pass.

    A row is a row of the view: all inputs of one output, of every matrix of a stack. An element with a zero
    gradient moves when its row has a mean.
    """

    name: ClassVar[str] = "gradient_centralization"
    asks: ClassVar[bool] = True
    stage: ClassVar[str] = "gradient"
    order: ClassVar[int] = 2

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        if g.ndim < 2:
            return g
        return g - (yield Mean(g, dim=-1)).unsqueeze(-1)


@dataclass(frozen=True, kw_only=True)
class OrthoGrad(Addon):
    """Removes the component along p and restores the norm (arXiv 2501.04697, flat form).

    a = <p, g> / ||p||^2 ; h = g - a p ; g <- h ||g|| / ||h||          p = 0 leaves g unchanged

    Where h is nothing but rounding errors (a parameter of one element, g parallel to p) g becomes 0: to restore the
    norm would make a full step of noise. Asks two rounds: <p, g>, ||p||^2, ||g||^2; then ||h||^2, which cannot be had
    from the first three where g is nearly parallel to p.
    """

    name: ClassVar[str] = "orthograd"
    asks: ClassVar[bool] = True
    stage: ClassVar[str] = "gradient"
    order: ClassVar[int] = 3

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        pg, pp, gg = yield Sum(p * g), Sum(p * p), Sum(g * g)
        rest = g - p * (pg / (pp + 1e-30))
        hh = yield Sum(rest * rest)
        return rest * torch.where(hh > ROUNDING * gg, gg / hh, 0.0).sqrt()


def is_zero(value: Any) -> bool:
    """Whether a number is known to be 0 without reading a device."""
    return not isinstance(value, Tensor) and value == 0
