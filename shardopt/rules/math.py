"""Formulas that more than one rule uses."""

from math import pi
from typing import Any

import torch
from torch import Tensor

from shardopt.ieee import sqrt


def adam_direction(m: Tensor, v: Tensor, bias2: Any, eps: Any, atan2: bool) -> Tensor:
    """m / (sqrt(v / bias2) + eps), or (4 / pi) atan2(m, sqrt(v / bias2)) (arXiv 2407.05872), which needs no eps.

    atan2 is evaluated in float64 and rounded: the vectorised float32 one depends on an element's place in memory.
    """
    root = sqrt(v).mul_(bias2**-0.5)  # one division an element less than torch, at most 1 ulp apart
    if atan2:
        return torch.atan2(m.double(), root.double()).mul_(4 / pi).float()
    return m / root.add_(eps)


def clip_rms(u: Tensor, mean_square: Tensor, d: float) -> Tensor:
    """u / max(1, RMS(u) / d), with the mean square of the whole parameter (arXiv 1804.04235)."""
    return u / (mean_square.sqrt() / d).clamp(min=1.0)
