"""Two 4-bit codes a byte: the low nibble is the even column; a byte never crosses the end of a row. And int4."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.codecs.base import Noise, Part
from shardopt.codecs.block import Absmax, to_codes
from shardopt.codecs.blocks import scale_part
from shardopt.codecs.geometry import Geometry


def pack(codes: Tensor, tail: int) -> Tensor:
    """uint8 codes of 0..15, (..., cols) -> (..., ceil(cols / 2)); the odd nibble of the last column is `tail`."""
    if codes.shape[-1] % 2:
        codes = torch.cat((codes, codes.new_full((*codes.shape[:-1], 1), tail)), dim=-1)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack(packed: Tensor, cols: int) -> Tensor:
    """Inverse of `pack`: (..., ceil(cols / 2)) -> (..., cols)."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2).narrow(-1, 0, cols)


def packed_part(suffix: str, view: tuple[int, ...], zero: int) -> Part:
    """The packed codes of a slot, both nibbles filled with the code of 0. A byte may not straddle ranks."""
    last = len(view) - 1
    dims = tuple((dim, 2 if dim == last else 1) for dim in range(len(view)))
    return Part(suffix, torch.uint8, dims, fill=zero | (zero << 4))


@dataclass(frozen=True, kw_only=True)
class Packed(Absmax):
    """An `Absmax` with two codes a byte; subclasses give `nibbles` and its inverse `levels`, both unpacked."""

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        return (packed_part(self.name, view, self.zero), scale_part(f"{self.name}_scale", view, self.block))

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        assert not geo.straddles(2), "a byte of two columns lies on two ranks"
        return pack(self.nibbles(ratio), self.zero)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        return self.levels(unpack(codes, geo.local[-1]))

    def nibbles(self, ratio: Tensor) -> Tensor:
        raise NotImplementedError

    def levels(self, nibbles: Tensor) -> Tensor:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Int4(Packed):
    """Uniform steps in 15 levels, two codes a byte.

    a = max|x|; s = a / 7; q = clamp(rint(x / s), -7, 7); nibble q + 8; decode q s.

    1/2 + 4/B bytes a parameter; absolute error at most a / 14: for momentum with decay <= .9, or of normalised
    updates (Li et al., arXiv:2309.01507, block 128).
    """

    name: ClassVar[str] = "int4"
    non_negative: ClassVar[bool] = False
    divisor: ClassVar[float] = 7.0

    block: int = 128

    @property
    def zero(self) -> int:
        return 8

    def nibbles(self, ratio: Tensor) -> Tensor:
        return to_codes(ratio.round_().clamp_(-7, 7).add_(8), torch.uint8)

    def levels(self, nibbles: Tensor) -> Tensor:
        return nibbles.to(torch.float32) - 8
