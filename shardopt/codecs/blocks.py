"""Blocks along the last dim of the view: they restart at every row and sit at GLOBAL multiples of the block length.

The block of element (i, j) is (i, j // block), with j the global column; the last block of a row may be short, and
nothing is padded. Where blocks lie whole on one rank, only the local ones are held; where some straddle ranks, every
rank holds all ceil(cols / block) of a row, and their maxima are asked.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from shardopt.asks import Asking, Max
from shardopt.codecs.base import Part
from shardopt.codecs.geometry import Geometry


class Blocks:
    """The blocks of one local piece. count: how many a row are held here; straddles: whether maxima are asked."""

    def __init__(self, geo: Geometry, block: int):
        self.block = block
        self.straddles = geo.straddles(block)
        self.cols = geo.local[-1]
        self.pieces: list[tuple[int, int, int, int]] = []  # first column, width of a block, first block, blocks
        column, held = 0, 0
        for start, length in geo.runs[-1]:
            first = held - start // block if not self.straddles else 0  # from a global block to its place here
            stop = start + length
            while start < stop:
                if start % block == 0 and stop - start >= block:
                    width, n = block, (stop - start) // block
                else:  # the head or the tail of a block
                    width, n = min(block - start % block, stop - start), 1
                self.pieces.append((column, width, first + start // block, n))
                held = first + start // block + n
                column, start = column + width * n, start + width * n
        self.count = -(-geo.view[-1] // block) if self.straddles else held

    def reduce(self, x: Tensor, op: str) -> Tensor:
        """Local "amax" or "amin" of every block: (..., cols) -> (..., count). NaN stays in its block.

        A block of which no element is local gets the identity.
        """
        merge = {"amax": torch.maximum, "amin": torch.minimum}[op]
        out = x.new_full((*x.shape[:-1], self.count), -torch.inf if op == "amax" else torch.inf)
        for column, width, block, n in self.pieces:
            piece = x.narrow(-1, column, width * n).unflatten(-1, (n, width))
            into = out.narrow(-1, block, n)
            into.copy_(merge(into, getattr(piece, op)(-1)))
        return out

    def sizes(self, x: Tensor) -> Tensor:
        """Local largest magnitude of every block, as `reduce`, without a tensor of magnitudes."""
        return torch.maximum(self.reduce(x, "amax"), -self.reduce(x, "amin")).add_(0.0)  # -0 becomes 0

    def paired(self, op: Callable[..., Tensor], x: Tensor, scale: Tensor) -> Tensor:
        """op(x, its block's number) for every element: (..., cols), (..., count) -> (..., cols); nothing is spread."""
        if len(self.pieces) == 1:
            _, width, block, n = self.pieces[0]
            return op(x.unflatten(-1, (n, width)), scale.narrow(-1, block, n).unsqueeze(-1)).flatten(-2)
        out = torch.empty_like(x)
        for column, width, block, n in self.pieces:
            piece, into = (y.narrow(-1, column, width * n).unflatten(-1, (n, width)) for y in (x, out))
            op(piece, scale.narrow(-1, block, n).unsqueeze(-1), out=into)
        return out

    def spread(self, scale: Tensor) -> Tensor:
        """Every block's number for each of its elements: (..., count) -> (..., cols)."""
        out = scale.new_empty((*scale.shape[:-1], self.cols))
        for column, width, block, n in self.pieces:
            out.narrow(-1, column, width * n).unflatten(-1, (n, width)).copy_(scale.narrow(-1, block, n).unsqueeze(-1))
        return out

    def largest(self, x: Tensor) -> Asking:
        """Generator; the largest magnitude of every block, over all ranks that hold a part of it."""
        local = self.sizes(x)
        if not self.straddles:
            return local
        return (yield Max(local, over=-1))


def scale_part(suffix: str, view: tuple[int, ...], block: int) -> Part:
    """A float32 number a block: (*view[:-1], ceil(view[-1] / block))."""
    last = len(view) - 1
    dims = tuple((dim, block if dim == last else 1) for dim in range(len(view)))
    return Part(suffix, torch.float32, dims, reducible=True)


def check_block(name: str, block: int) -> None:
    """Refuse a block length that no layout can cut evenly. Powers of two keep packed bytes inside blocks."""
    if type(block) is not int or not 8 <= block <= 1 << 16 or block & (block - 1):
        raise ValueError(f"{name} got block={block!r}, but a block is a power of two from 8 to 65536. Use 128 or 256.")
