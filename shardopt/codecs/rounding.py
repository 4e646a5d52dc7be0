"""Rounding float32 to fewer bits, to nearest or stochastically, so that what is finite stays finite.

Stochastic rounding of t between the integers n and n + 1 is floor(t + U), U uniform in [0, 1): n + 1 where
U >= 1 - (t - n), which has the probability t - n, so that the mean is t; an integer never changes.
"""

from typing import NamedTuple

import torch
from torch import Tensor

LEAST = 2.0**-149  # the smallest positive float32


class Grid(NamedTuple):
    """A floating-point format: bits of the fraction, exponent of the smallest normal number, largest number."""

    fraction: int
    lowest: int
    largest: float

    @property
    def least(self) -> float:
        """The smallest positive number."""
        return 2.0 ** (self.lowest - self.fraction)


GRIDS = {
    torch.bfloat16: Grid(7, -126, torch.finfo(torch.bfloat16).max),
    torch.float16: Grid(10, -14, 65504.0),
    torch.float8_e4m3fn: Grid(3, -6, 448.0),
}


def uniform(noise: Tensor) -> Tensor:
    """float32 in [0, 1) from the top 24 of 32 random bits; noise: int32."""
    return ((noise >> 8) & 0xFFFFFF).to(torch.float32) * 2.0**-24  # the mask makes the shift a logical one


def dither(t: Tensor, u: Tensor, tolerance: Tensor | float = 0.0) -> Tensor:
    """floor(t + u) in exact arithmetic, t >= 0; the nearest integer where t is within `tolerance` of it.

    The tolerance is for t computed from a stored code, which rounding errors push off its integer. It must be far
    below the change of t in one step, or else this would be nearest rounding again.
    """
    low = t.floor()
    near = t.round()
    return torch.where((t - near).abs() <= tolerance, near, low + (u >= 1 - (t - low)))


def round_nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`, ties to even; a finite value beyond the largest number becomes that number."""
    if dtype not in GRIDS:
        return x.to(dtype)
    largest = GRIDS[dtype].largest
    return torch.where(x.isinf(), x, x.clamp(-largest, largest)).to(dtype)


def round_stochastic(x: Tensor, dtype: torch.dtype, noise: Tensor, tolerance: float = 0.0) -> Tensor:
    """x in `dtype`, one of its two neighbours at random such that the mean is x.

    x: float32; noise: int32 of the same shape, 32 random bits an element. Numbers of the format are unchanged (also
    when off by `tolerance`, relatively), NaN stays NaN, Inf stays Inf, finite values never become Inf.
    """
    if dtype == torch.bfloat16:
        return _stochastic_bf16(x, noise)
    if dtype not in GRIDS:
        return x.to(dtype)
    grid = GRIDS[dtype]
    exponent = ((x.view(torch.int32) >> 23) & 0xFF).clamp_min(grid.lowest + 127)
    ulp = ((exponent - grid.fraction) << 23).view(torch.float32)
    t = x.abs() / ulp  # exact: a power of two
    rounded = (dither(t, uniform(noise), t * tolerance) * ulp).clamp_max(grid.largest).copysign(x)
    return torch.where(x.isfinite(), rounded, x).to(dtype)


def _stochastic_bf16(x: Tensor, noise: Tensor) -> Tensor:
    """The low 16 bits of the noise are added to the bits that bf16 lacks; the carry rounds away from zero."""
    bits = x.view(torch.int32)
    magnitude = (bits & 0x7FFFFFFF) + (noise & 0xFFFF)
    magnitude = magnitude.clamp_max(0x7F7FFFFF) & ~0xFFFF
    rounded = (magnitude | (bits & -0x80000000)).view(torch.float32)
    return torch.where(x.isfinite(), rounded, x).to(dtype=torch.bfloat16)


def keep_positive(rounded: Tensor, x: Tensor, least: float) -> Tensor:
    """`rounded`, but at least `least` where x > 0: a second moment that becomes 0 is a step of g / eps."""
    return torch.where(x > 0, rounded.clamp_min(least), rounded)
