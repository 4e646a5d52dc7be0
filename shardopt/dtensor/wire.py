"""A codec as the format of a message: encode what is local, cut and join codes, decode; blocks are GLOBAL, as stored.

Nothing is repeated for a rank that holds only some columns: of scales it gets those of the blocks it touches, and
two codes of a byte are packed anew where a cut would part them.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from shardopt.asks import Asking, result_of
from shardopt.codecs import Codec, Geometry, Part
from shardopt.codecs.geometry import Runs
from shardopt.codecs.packed import pack, unpack
from shardopt.dtensor.held import length, place, select

Piece = list[Tensor]  # the parts of some matrices of a stack, or of what one rank holds of them, in the codec's order


class Local(Geometry):
    """A geometry in which bytes are packed for the message: none is ever parted."""

    def straddles(self, block: int) -> bool:
        return block != 2 and super().straddles(block)


@dataclass(frozen=True)
class Format:
    """How stacks of matrices (rows, cols) travel. coder, where one is given: `shardopt.kernels.wire.Coder`, which does
    what it can of the codec's work."""

    codec: Codec
    rows: int
    cols: int

    @cached_property
    def parts(self) -> tuple[Part, ...]:
        return self.codec.parts((1, self.rows, self.cols))

    @property
    def element_bytes(self) -> float:
        """Bytes an element of a whole matrix."""
        shape = (1, self.rows, self.cols)
        sizes = [part.shape(shape, shape) for part in self.parts]
        total = sum(part.dtype.itemsize * a * b * c for part, (a, b, c) in zip(self.parts, sizes))
        return total / max(1, self.rows * self.cols)

    def encoding(self, x: Tensor, geo: Geometry, coder: Any = None) -> Asking:
        """Generator that returns the Piece of x, fp32 in the local view `geo`; straddling blocks ask their maxima."""
        local = Local(geo.view, geo.runs, geo.cuts)
        parts = coder and coder.encode(self.codec, x, local)
        if parts is None:
            parts = yield from self.codec.encode(x, local, refused)
        piece = []
        for part in self.parts:
            stored = parts[part.suffix].flatten(end_dim=-3) if x.ndim > 2 else parts[part.suffix].unsqueeze(0)
            if part.reducible and geo.straddles(unit(part)):
                stored = along(stored, touched(geo.runs[-1], unit(part)))
            piece.append(stored)
        return piece

    def encode(self, x: Tensor, coder: Any = None) -> Piece:
        """The parts of whole matrices, fp32 (count, rows, cols)."""
        geo = stack(len(x), self.rows, self.cols)
        return result_of(self.encoding(x, geo, coder))

    def decode(self, piece: Piece, rows: Runs, cols: Runs, coder: Any = None) -> Tensor:
        """fp32 (count, *, *) of these rows and columns."""
        count = len(piece[0])
        geo = Geometry((count, self.rows, self.cols), (((0, count),), rows, cols), ((), (), ()))
        parts = {part.suffix: x for part, x in zip(self.parts, piece)}
        x = coder and coder.decode(self.codec, parts, geo)
        return self.codec.decode(parts, geo) if x is None else x

    def shapes(self, count: int, rows: Runs, cols: Runs) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Of the Piece with these rows and columns of `count` matrices."""
        return [((count, length(rows), width(part, cols)), part.dtype) for part in self.parts]

    def cut(self, piece: Piece, matrices: Runs, rows: Runs, cols: Runs) -> Piece:
        """Out of the parts of whole matrices."""
        found = []
        for part, x in zip(self.parts, piece):
            x = select(x, matrices, rows)
            if is_packed(part) and parted(cols):
                found.append(pack(along(unpack(x, self.cols), cols), 0))
            else:
                found.append(along(x, touched(cols, unit(part))))
        return found

    def join(self, count: int, pieces: Sequence[tuple[Piece, Runs, Runs, Runs]]) -> Piece:
        """The parts of `count` whole matrices out of all (piece, its matrices, rows, cols)."""
        if len(pieces) == 1:
            return pieces[0][0]
        unpacked = any(parted(cols) for *_, cols in pieces)
        whole = []
        for i, part in enumerate(self.parts):
            loose = unpacked and is_packed(part)
            shape = (count, self.rows, self.cols)
            into = pieces[0][0][i].new_empty(shape if loose else part.shape(shape, shape))
            for piece, matrices, rows, cols in pieces:
                x = unpack(piece[i], length(cols)) if loose else piece[i]
                place(into, x, matrices, rows, cols if loose else touched(cols, unit(part)))
            whole.append(pack(into, 0) if loose else into)
        return whole


def refused() -> Tensor:
    raise AssertionError("a wire draws no noise")


def stack(count: int, rows: int, cols: int) -> Geometry:
    return Geometry((count, rows, cols), (((0, count),), ((0, rows),), ((0, cols),)), ((), (), ()))


def unit(part: Part) -> int:
    """Columns that share one entry of the part's last dim."""
    return 1 if part.dims is None else part.dims[-1][1]


def is_packed(part: Part) -> bool:
    return unit(part) == 2 and not part.reducible


def touched(cols: Runs, unit: int) -> Runs:
    """The entries that these columns touch, run by run."""
    return tuple((first // unit, -(-(first + n) // unit) - first // unit) if n else (0, 0) for first, n in cols)


def parted(cols: Runs) -> bool:
    """Whether these columns, packed by twos, are other bytes than those of the whole row."""
    return any(first % 2 for first, _ in cols) or any(n % 2 for _, n in cols[:-1])


def width(part: Part, cols: Runs) -> int:
    """Entries of the part's last dim for these columns."""
    return -(-length(cols) // 2) if is_packed(part) else length(touched(cols, unit(part)))


def along(x: Tensor, cols: Runs) -> Tensor:
    """These entries of the last dim."""
    pieces = [x.narrow(-1, first, n) for first, n in cols]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, -1)
