"""Logarithmic codes of non-negative tensors: equal steps of log2 between a block's smallest and largest positive.

    hi = log2 max x; lo = min(max(log2 min{x > 0}, -126), hi - 1); range = hi - lo            (Q levels)
    t  = (log2 x - lo) / range * (Q - 1)
    q  = 0 where x = 0, else clamp(floor(t + U) + 1, 1, Q);    decode: 0 where q = 0, else 2^(lo + (q-1) range / (Q-1))

A block without a positive element has lo = range = 0. Zeros do not enter lo: they would stretch the range to 100
octaves. The range is at least one octave, so that two codes are never the same float32.

What makes encode(decode(s)) == s: log2 and exp2 are evaluated in float64 (which also makes them independent of an
element's place in the tensor); hi and lo are rounded to multiples of 2^-20, wider than a float32's logarithm is
uncertain, so that a decoded extreme finds them again; and t counts as a whole number within 2^-19 octaves of one,
far below the 1.4e-3 octaves of a step of decay .999. t may be worked out in float32: 2^-22 of its largest value is
added.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Max
from shardopt.codecs.base import Noise, Part, Parts, Rounded
from shardopt.codecs.block import to_codes
from shardopt.codecs.blocks import Blocks, check_block, scale_part
from shardopt.codecs.geometry import Geometry
from shardopt.codecs.packed import pack, packed_part, unpack
from shardopt.codecs.rounding import LEAST, dither, uniform

TOLERANCE = 2.0**-19  # octaves
LARGEST = torch.finfo(torch.float32).max


def on_grid(log: Tensor) -> Tensor:
    """Octaves, to the nearest multiple of 2^-20."""
    return (log * 2.0**20).round() * 2.0**-20


@dataclass(frozen=True, kw_only=True)
class Log8(Rounded):
    """255 equal steps of log2 over a block's own range, and an exact 0.

    1 + 8/B bytes a parameter, for second moments.

    Relative error at most 2^(range / 508) - 1 to nearest: 2.8 % for 20 octaves, half of that in 1 / sqrt(v). Nearest
    rounding (parity only) does not follow a lasting drop of the gradients, hence "auto" is stochastic.
    """

    name: ClassVar[str] = "log8"
    signed: ClassVar[bool] = False
    levels: ClassVar[int] = 255

    block: int = 512

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.name, self.block)

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        numbers = (scale_part(f"{self.name}_{what}", view, self.block) for what in ("lo", "range"))
        return (self.code_part(view), *numbers)

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        blocks = Blocks(geo, self.block)
        lo, span = (parts[f"{self.name}_{what}"].to(torch.float64) for what in ("lo", "range"))
        q = self.load(parts[self.name], geo)
        log = blocks.spread(lo) + (q - 1) * blocks.spread(span / (self.levels - 1))
        return torch.where(q == 0, 0.0, log.exp2().clamp(LEAST, LARGEST).to(torch.float32))

    def encode(self, x: Tensor, geo: Geometry, noise: Noise) -> Asking:
        blocks = Blocks(geo, self.block)
        largest = blocks.reduce(x, "amax")
        least = blocks.reduce(torch.where(x > 0, x, torch.inf), "amin")
        if blocks.straddles:
            largest, negated = yield (Max(largest, over=-1), Max(-least, over=-1))
            least = -negated
        hi = on_grid(largest.to(torch.float64).log2())
        lo = torch.minimum(on_grid(least.to(torch.float64).log2()).clamp_min(-126), hi - 1).to(torch.float32)
        span = (hi - lo).to(torch.float32)
        empty = largest == 0
        lo, span = lo.masked_fill(empty, 0), span.masked_fill(empty, 0)

        rate = (self.levels - 1) / span.to(torch.float64).masked_fill(empty, torch.inf)  # codes an octave
        steps = self.levels - 1
        t = ((x.to(torch.float64).log2() - blocks.spread(lo)) * blocks.spread(rate)).to(torch.float32)
        if self.stochastic:
            tolerance = (rate * TOLERANCE + steps * 2.0**-22).to(torch.float32)  # octaves, and what float32 rounds
            t = dither(t, uniform(noise()), blocks.spread(tolerance))
        q = torch.where(x == 0, 0, t.round().nan_to_num(0.0).clamp(0, steps) + 1)
        return {self.name: self.store(q), f"{self.name}_lo": lo, f"{self.name}_range": span}

    def code_part(self, view: tuple[int, ...]) -> Part:
        return Part(self.name, torch.uint8)

    def store(self, q: Tensor) -> Tensor:
        """Codes 0..levels, as float32, in the stored type."""
        return to_codes(q, torch.uint8)

    def load(self, codes: Tensor, geo: Geometry) -> Tensor:
        """Codes 0..levels from the stored type."""
        return codes.to(torch.int32)


@dataclass(frozen=True, kw_only=True)
class Log16(Log8):
    """65535 equal steps of log2 over a block's own range, and an exact 0.

    In int16 read as unsigned: 2 + 8/B bytes a parameter.

    Relative error .011 % for 20 octaves: nearest rounding follows decays up to .999.
    """

    name: ClassVar[str] = "log16"
    levels: ClassVar[int] = 65535

    rounding: str = "nearest"

    def code_part(self, view: tuple[int, ...]) -> Part:
        return Part(self.name, torch.int16)

    def store(self, q: Tensor) -> Tensor:
        return q.to(torch.int32).to(torch.int16)

    def load(self, codes: Tensor, geo: Geometry) -> Tensor:
        return codes.to(torch.int32) & 0xFFFF


@dataclass(frozen=True, kw_only=True)
class Log4(Log8):
    """15 equal steps of log2 over a block's own range, and an exact 0.

    Two codes a byte: 1/2 + 8/B bytes a parameter.

    A step is range / 14, 1.4 octaves for 20: every element is right within a factor of about 2.7, and over time in
    the mean of its logarithm. Compare with `factored` before using it.
    """

    name: ClassVar[str] = "log4"
    levels: ClassVar[int] = 15

    block: int = 256

    def code_part(self, view: tuple[int, ...]) -> Part:
        return packed_part(self.name, view, 0)

    def store(self, q: Tensor) -> Tensor:
        return pack(to_codes(q, torch.uint8), 0)

    def load(self, codes: Tensor, geo: Geometry) -> Tensor:
        assert not geo.straddles(2), "a byte of two columns lies on two ranks"
        return unpack(codes, geo.local[-1]).to(torch.int32)
