"""`Whole` without moving matrices: the Gram form, of which only the small side is summed, and the local shard alone."""

from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Gram(NamedTuple):
    """Work on matrices x whose long dim `over` (-2 or -1) is cut: x Q or Q x, Q of the products of the other dim.

    The products are summed in float32, the one sum that is: they are as large as a matrix. x must be within 1e-18 to
    1e18, so that they have a place there.
    """

    x: Tensor
    work: Any
    over: int

    def products(self) -> Tensor:
        """Of the local piece: (..., cols, cols) where rows are cut, (..., rows, rows) where columns are."""
        return self.x.mT @ self.x if self.over == -2 else self.x @ self.x.mT

    def answer(self, products: Tensor) -> Tensor:
        factor = self.work.gram_factor(products)
        return self.x @ factor if self.over == -2 else factor @ self.x


class Local(NamedTuple):
    """Work on what this rank holds, as if that were all."""

    x: Tensor
    work: Any

    def answer(self) -> Tensor:
        return self.work(self.x) if prod(self.x.shape) else torch.zeros_like(self.x)
