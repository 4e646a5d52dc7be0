"""Formats that are known to be bad: controls that quality and pitfall tests must be able to see."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.codecs.base import Noise, Parts
from shardopt.codecs.block import Absmax, Int8, to_codes
from shardopt.codecs.blocks import Blocks
from shardopt.codecs.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class LinearUint8(Absmax):
    """x / max x in equal steps, nearest, small values becoming 0: steps explode."""

    name: ClassVar[str] = "linear_uint8"
    signed: ClassVar[bool] = False
    divisor: ClassVar[float] = 255.0
    least: ClassVar[int] = 0

    block: int = 2048

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        codes = ratio.round().clamp(0, self.divisor)
        return to_codes(torch.where(x > 0, codes.clamp_min(self.least), codes), self.dtype)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        return codes.float()

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        return self.values(parts[self.name], geo) * Blocks(geo, self.block).spread(parts[f"{self.name}_scale"])


@dataclass(frozen=True, kw_only=True)
class LinearUint4(LinearUint8):
    """15 equal steps, no zero for positive values (stored a byte each): denominators up to 15 times too large."""

    name: ClassVar[str] = "linear_uint4"
    divisor: ClassVar[float] = 15.0
    least: ClassVar[int] = 1

    block: int = 128


@dataclass(frozen=True, kw_only=True)
class PlainUint4(LinearUint4):
    """15 equal steps with a zero, as a plain 4-bit quantizer has it."""

    name: ClassVar[str] = "plain_uint4"
    least: ClassVar[int] = 0


@dataclass(frozen=True, kw_only=True)
class Plain3(Int8):
    """7 equal steps from -a to a (stored a byte each): what 3 bits would hold."""

    name: ClassVar[str] = "plain3"
    divisor: ClassVar[float] = 3.0

    block: int = 64

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        return to_codes(ratio.round().clamp(-self.divisor, self.divisor), self.dtype)


@dataclass(frozen=True, kw_only=True)
class Plain2(Plain3):
    """-a, 0 or a: what 2 bits would hold."""

    name: ClassVar[str] = "plain2"
    divisor: ClassVar[float] = 1.0
