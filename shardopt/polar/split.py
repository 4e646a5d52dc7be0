"""Blocks of rows, each orthogonalized by itself: fused query, key and value projections, single heads."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.polar.base import Orthogonalizer


@dataclass(frozen=True, kw_only=True)
class Split(Orthogonalizer):
    """Rows cut into blocks, each given to `work` alone.

    sizes: rows of every block, an int for equal blocks, or a tuple that adds up to the rows. factors: what each block's
    result is multiplied with; none given: 1.
    """

    name: ClassVar[str] = "split"
    work: Orthogonalizer
    sizes: int | tuple[int, ...]
    factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        sizes = self.sizes if isinstance(self.sizes, tuple) else (self.sizes,)
        if not sizes or min(sizes) < 1:
            raise ValueError(f"split got sizes={self.sizes}; blocks have at least one row each.")

    def blocks(self, rows: int) -> tuple[int, ...]:
        """Rows of every block; ValueError where they do not add up."""
        sizes = self.sizes if isinstance(self.sizes, tuple) else (self.sizes,) * (rows // self.sizes)
        if sum(sizes) != rows:
            raise ValueError(
                f"split got a matrix of {rows} rows, which blocks of sizes={self.sizes} do not fill. "
                "Give sizes that add up to the rows, or a divisor of them."
            )
        return sizes

    def polar(self, x: Tensor) -> Tensor:
        sizes = self.blocks(x.shape[-2])
        if len(set(sizes)) == 1:  # one batch
            found = self.work(x.unflatten(-2, (len(sizes), sizes[0]))).flatten(-3, -2)
        else:
            found = torch.cat([self.work(block) for block in x.split(sizes, dim=-2)], dim=-2)
        if not self.factors:
            return found
        return torch.cat([block * f for block, f in zip(found.split(sizes, dim=-2), self.factors, strict=True)], dim=-2)

    def flops(self, rows: int, cols: int) -> float:
        return sum(self.work.flops(size, cols) for size in self.blocks(rows))

    def key(self) -> str:
        sizes = "_".join(map(str, self.sizes)) if isinstance(self.sizes, tuple) else f"every{self.sizes}"
        return f"{self.name}.{sizes}({self.work.key()})"
