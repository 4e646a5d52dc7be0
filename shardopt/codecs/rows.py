"""One number a row: the format of slots that are shaped like a parameter's rows, not like the parameter."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.codecs.base import Codec, Noise, Part, Parts
from shardopt.codecs.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Rows(Codec):
    """One float32 number a row of the view: 4 / cols bytes a parameter, exact.

    No choice of the user's: a slot that is declared by rows has this codec, whatever `state` says. It is cut like the
    rows, and the same on all ranks that share them.
    """

    name: ClassVar[str] = "rows"

    def fits(self, view: tuple[int, ...]) -> bool:
        return len(view) >= 2

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        return (Part("rows", torch.float32, tuple((dim, 1) for dim in range(len(view) - 1))),)

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        return parts["rows"]

    def encode(self, x: Any, geo: Geometry, noise: Noise) -> Asking:
        return {"rows": x}
        yield  # a generator like those that ask
