"""8-bit codes of x relative to its block's largest magnitude: int8, sqrt8, root4, fp8."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.codecs.base import Codec, Noise, Part, Parts, Rounded
from shardopt.codecs.blocks import Blocks, check_block, scale_part
from shardopt.codecs.geometry import Geometry
from shardopt.codecs.rounding import LEAST, dither, keep_positive, round_nearest, round_stochastic, uniform
from shardopt.ieee import sqrt

TOLERANCE = 2.0**-20  # relative error of a code that was decoded and divided by its scale again: at most 4e-7


@dataclass(frozen=True, kw_only=True)
class Absmax(Codec):
    """A code of x / scale, scale = max|x| / divisor, one float32 a block.

    A subclass says what a code is: `quantise` (x / scale to codes) and its inverse `values`. scale is 0 exactly where
    the block is, is NaN where the block holds one, and has no floor: the codes do not depend on the gradient's scale.
    A format of roots takes them before it divides (`relative`): one division a block in place of one an element.
    """

    dtype: ClassVar[torch.dtype] = torch.uint8
    divisor: ClassVar[float] = 1.0

    block: int = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        check_block(self.name, self.block)

    @property
    def zero(self) -> int:
        """What the stored codes of a new slot are filled with: the code of 0."""
        return 0

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        codes = Part(self.name, self.dtype, fill=self.zero)
        return (codes, scale_part(f"{self.name}_scale", view, self.block))

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        values = self.values(parts[self.name], geo)
        y = Blocks(geo, self.block).paired(torch.mul, values, parts[f"{self.name}_scale"])
        return y if self.slot_signed else keep_positive(y, values, LEAST)

    def encode(self, x: Tensor, geo: Geometry, noise: Noise) -> Asking:
        blocks = Blocks(geo, self.block)
        largest = yield from blocks.largest(x)
        scale = torch.where(largest > 0, (largest / self.divisor).clamp_min(LEAST), largest)
        ratio = self.relative(x, torch.where(scale == 0, 1, scale), blocks)
        return {self.name: self.quantise(ratio, x, geo, noise), f"{self.name}_scale": scale}

    def relative(self, x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
        """What `quantise` gets: x / scale."""
        return blocks.paired(torch.div, x, scale)

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        """Codes of ratio = x / scale, which may be overwritten; |ratio| <= divisor up to rounding. NaN gets any."""
        raise NotImplementedError

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        """float32 multiples of the scale."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Int8(Absmax):
    """Uniform steps of a block's largest magnitude.

    a = max|x|; s = a / 127; q = clamp(rint(x / s), -127, 127); decode q s.

    1 + 4/B bytes a parameter; absolute error at most a / 254: small elements of a block lose all their bits, hence
    blocks of 256 (Dettmers et al., arXiv:2110.02861, with a uniform table).
    """

    name: ClassVar[str] = "int8"
    non_negative: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.int8
    divisor: ClassVar[float] = 127.0

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        return to_codes(ratio.round_().clamp_(-127, 127), self.dtype)  # beyond 127 only where the scale is subnormal

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        return codes.to(torch.float32)


@dataclass(frozen=True, kw_only=True)
class Sqrt8(Absmax):
    """Signed square roots in int8: small elements keep more bits.

    a = max|x|; q = clamp(rint(127 sign(x) sqrt(|x| / a)), -127, 127); decode a sign(q) (q / 127)^2.

    1 + 4/B bytes a parameter; absolute error about sqrt(|x| a) / 127: small elements keep more than in int8, large
    ones less. The smallest magnitude is a / 16129.
    """

    name: ClassVar[str] = "sqrt8"
    non_negative: ClassVar[bool] = False
    dtype: ClassVar[torch.dtype] = torch.int8

    def relative(self, x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
        """127 sign(x) sqrt(|x| / scale)."""
        return blocks.paired(torch.mul, sqrt(x.abs()), sqrt(scale).reciprocal() * 127).copysign_(x)

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        return to_codes(ratio.round_(), self.dtype)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        t = codes.to(torch.float32) * (1 / 127)  # 127 (1/127) is 1 in float32: the largest element keeps its bits
        return t * t.abs()


@dataclass(frozen=True, kw_only=True)
class Root4(Rounded, Absmax):
    """Fourth roots in uint8, stochastically rounded, no zero code for a positive value.

    a = max x; t = 255 (x / a)^(1/4); q = 0 where x = 0, else clamp(floor(t + U), 1, 255); decode a (q / 255)^4.

    1 + 4/B bytes a parameter; for second moments: relative error about 4 / t, and t = 255 ... 1 spans 32 octaves.
    The fourth root of v is the square root of the step's denominator. rounding="nearest" is rint(t), for parity only.
    """

    name: ClassVar[str] = "root4"
    signed: ClassVar[bool] = False

    def relative(self, x: Tensor, scale: Tensor, blocks: Blocks) -> Tensor:
        """255 (x / scale)^(1/4)."""
        return blocks.paired(torch.mul, sqrt(sqrt(x)), sqrt(sqrt(scale)).reciprocal() * 255)

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        t = dither(ratio, uniform(noise()), ratio * TOLERANCE) if self.stochastic else ratio.round()
        return to_codes(torch.where(x > 0, t.clamp(1, 255), t), self.dtype)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        t = codes.to(torch.float32) * (1 / 255)  # 255 (1/255) is 1 in float32
        t = t * t
        return t * t


@dataclass(frozen=True, kw_only=True)
class Fp8(Rounded, Absmax):
    """E4M3 floats with a block scale.

    a = max|x|; s = a / 448; code = x / s in E4M3; decode code s.

    1 + 4/B bytes a parameter; relative error at most 2^-4 down to a 2^-15, absolute steps of a 2^-18 below that
    (Micikevicius et al., arXiv:2209.05433). Positive values of a non-negative slot keep at least the smallest code.
    """

    name: ClassVar[str] = "fp8"
    dtype: ClassVar[torch.dtype] = torch.float8_e4m3fn
    divisor: ClassVar[float] = 448.0

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        if not self.slot_signed:
            ratio = keep_positive(ratio, x, 2.0**-9)
        if self.stochastic:
            return round_stochastic(ratio, self.dtype, noise(), TOLERANCE)
        return round_nearest(ratio, self.dtype)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        return codes.to(torch.float32)


def to_codes(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Whole numbers, overwritten, as integers. The scale of a NaN is NaN already; its code must not be undefined."""
    return t.nan_to_num_(0.0).to(dtype)
