"""Formats that round every element by itself: fp32, bf16, fp16."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.codecs.base import Codec, Noise, Part, Parts, Rounded
from shardopt.codecs.geometry import Geometry
from shardopt.codecs.rounding import GRIDS, keep_positive, round_nearest, round_stochastic


@dataclass(frozen=True, kw_only=True)
class Fp32(Codec):
    """The value itself.

    4 bytes a parameter, exact, fits every shape.

    The part has the slot's own name, so that checkpoints of torch.optim load as they are.
    """

    name: ClassVar[str] = "fp32"

    def fits(self, view: tuple[int, ...]) -> bool:
        return True

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("", torch.float32),)

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        return parts[""]

    def encode(self, x: Tensor, geo: Geometry, noise: Noise) -> Asking:
        return {"": x}
        yield  # a generator like those that ask


@dataclass(frozen=True, kw_only=True)
class Half(Rounded):
    """A 16-bit floating-point type: 2 bytes a parameter. Positive values of a non-negative slot never become 0."""

    dtype: ClassVar[torch.dtype]

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part(self.name, self.dtype),)

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        return parts[self.name].to(torch.float32)

    def encode(self, x: Tensor, geo: Geometry, noise: Noise) -> Asking:
        y = round_stochastic(x, self.dtype, noise()) if self.stochastic else round_nearest(x, self.dtype)
        if not self.slot_signed:
            y = keep_positive(y, x, GRIDS[self.dtype].least)
        return {self.name: y}
        yield  # a generator like those that ask


@dataclass(frozen=True, kw_only=True)
class Bf16(Half):
    """bfloat16, nearest in signed slots, stochastic in non-negative ones.

    Relative error at most 2^-9, the range of float32.

    Nearest rounding keeps s where |x - s| (1 - decay) < 2^-9 |s|: harmless for momentum (decay <= .95), but a second
    moment with decay .999 stops following, so non-negative slots round stochastically.
    """

    name: ClassVar[str] = "bf16"
    dtype: ClassVar[torch.dtype] = torch.bfloat16


@dataclass(frozen=True, kw_only=True)
class Fp16(Half):
    """float16, nearest in signed slots, stochastic in non-negative ones.

    Relative error at most 2^-12 from 6e-5 to 65504; saturates above, has 2^-24 steps below.

    The squares of small gradients do not fit that range: prefer bf16 for second moments.
    """

    name: ClassVar[str] = "fp16"
    dtype: ClassVar[torch.dtype] = torch.float16
