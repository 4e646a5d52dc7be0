"""Formats that are known to be bad: controls that quality and pitfall tests must be able to see."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from shardopt.codecs.base import Noise
from shardopt.codecs.block import Absmax, to_codes
from shardopt.codecs.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class LinearUint8(Absmax):
    """x / max x in 255 equal steps, nearest: small second moments become 0 and their steps explode."""

    name: ClassVar[str] = "linear_uint8"
    signed: ClassVar[bool] = False
    divisor: ClassVar[float] = 255.0

    block: int = 2048

    def quantise(self, ratio: Tensor, x: Tensor, geo: Geometry, noise: Noise) -> Tensor:
        return to_codes(ratio.round().clamp(0, 255), self.dtype)

    def values(self, codes: Tensor, geo: Geometry) -> Tensor:
        return codes.float()

    def decode(self, parts, geo):  # type: ignore[no-untyped-def]
        from shardopt.codecs.blocks import Blocks

        return self.values(parts[self.name], geo) * Blocks(geo, self.block).spread(parts[f"{self.name}_scale"])
