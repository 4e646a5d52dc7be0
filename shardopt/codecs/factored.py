"""Second moments as the product of a row and a column, exact where v has rank one (Adafactor, arXiv:1804.04235)."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Mean
from shardopt.codecs.base import Codec, Noise, Part, Parts
from shardopt.codecs.geometry import Geometry

FLOOR = 1e-30


@dataclass(frozen=True, kw_only=True)
class Factored(Codec):
    """Row and column means of a matrix, of every matrix of a stack, of a convolution's view.

    row_i = mean_j v_ij; col_j = mean_i v_ij; decode row_i col_j / mean(row).

    4 (rows + cols) / (rows cols) bytes a parameter. Row and column means are linear, so s <- decay s + x acts on them
    exactly; the error is that of rank one, for single elements without a bound. Rows and columns of zeros stay
    exactly zero. Asks the means of x, and the mean of the old row where rows may be sharded.
    """

    name: ClassVar[str] = "factored"
    signed: ClassVar[bool] = False
    projects: ClassVar[bool] = True

    def fits(self, view: tuple[int, ...]) -> bool:
        return len(view) >= 2

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        dims = tuple((dim, 1) for dim in range(len(view)))
        return (Part("row", torch.float32, dims[:-1]), Part("col", torch.float32, (*dims[:-2], dims[-1])))

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        """Only where all rows are local: the mean of a part of `row` is another number. Elsewhere use `read`."""
        assert not geo.cuts[-2], "the rows lie on several ranks: read() asks for their mean"
        return product(parts["row"], parts["col"], parts["row"].mean(dim=-1), FLOOR)

    def read(self, parts: Parts, geo: Geometry) -> Asking:
        mean = yield Mean(parts["row"], dim=-1, over=-2)
        return product(parts["row"], parts["col"], mean, FLOOR)

    def encode(self, x: Any, geo: Geometry, noise: Noise) -> Asking:
        """Parts (from `recur`) as they are; of a tensor, its means."""
        if isinstance(x, dict):
            return x
        row, col = yield (Mean(x, dim=-1), Mean(x, dim=-2))
        return {"row": row, "col": col}

    def recur(self, parts: Parts, decay: Any, x: Tensor, geo: Geometry, floor: float = FLOOR) -> Asking:
        row, col, old = parts["row"], parts["col"], Mean(parts["row"], dim=-1, over=-2)
        rows, cols, mean, old_mean = yield (Mean(x, dim=-1), Mean(x, dim=-2), Mean(x, dim=(-2, -1)), old)
        row, col = row * decay + rows, col * decay + cols
        return product(row, col, old_mean * decay + mean, floor), {"row": row, "col": col}


def product(row: Tensor, col: Tensor, mean: Tensor, floor: float) -> Tensor:
    """row_i col_j / max(mean, floor), float32; mean: one number a matrix, of `row` over all rows."""
    relative = row / mean.clamp_min(floor).to(torch.float32).unsqueeze(-1)
    return relative.unsqueeze(-1) * col.unsqueeze(-2)
