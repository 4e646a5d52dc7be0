"""Descriptors: what a kernel is told of one parameter, as rows of int64 that mirror structs in csrc/step.h."""

from collections.abc import Iterable, Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import numpy as np

from shardopt.codecs.geometry import Geometry
from shardopt.kernels.key import Key, Round
from shardopt.kernels.lines import parts_by_row
from shardopt.kernels.twins import sums_rows
from shardopt.state import part_specs

# columns of a `Span`; the pointers of the parts follow
P, G, STEP, KEY, GROUP, ROWS, COLS, ROW0, COL0, LD, WIDTH, TILE0, PARTS = range(13)
# columns of a `Place`
PARAMETER, MATRIX, LINE, COLUMN, HIGH, WIDE, ACROSS, ROWS0, COLS0, PIECE0 = range(10)


class Pieces(NamedTuple):
    """How what asks is cut into pieces, each of which is added up by itself; the sums are few beside the elements.

    elements: of a piece; row: the most elements of a row whose rows are summed; high, wide: of one whose columns are.
    strips: whether a step with a factored slot takes the latter kind in all its passes.
    """

    elements: int
    row: int
    high: int
    wide: int
    strips: bool

    def kind(self, key: Key, asked: Round) -> bool:
        """Whether the pieces of this round are those of column sums."""
        return key.factored if self.strips else "column means" in asked

    def sides(self, key: Key, cols: int, by_column: bool) -> tuple[int, int]:
        """Rows and columns of a piece, by the shape alone."""
        if by_column:
            return self.high, max(self.wide, key.tile)
        most = self.row if key.sums_rows else self.elements
        wide = min(-(-cols // key.tile) * key.tile, most)
        return max(1, self.elements // wide), wide


CPU = Pieces(1 << 14, 1 << 14, 1 << 10, 1 << 11, False)  # a thread takes one
GPU = Pieces(1 << 15, 1 << 12, 1 << 8, 1, True)  # a CTA takes one; its warps keep the columns of a strip in registers


class Part(NamedTuple):
    """A stored part of a slot: its name, bytes of an entry, how many columns share one; or an entry a row or column;
    or, of blocks that lie on several ranks, how many every row of every rank has."""

    name: str
    bytes: int
    columns: int = 1
    line: str = ""
    all: int = 0


class Places(NamedTuple):
    """The places of a parameter's spans, as they are; how many pieces and doubles of sums they have together.

    lines, columns, matrices: what the sums of rows, of columns and of whole pieces come to, as rows of (the first, of
    doubles or of pieces; which local row, column or matrix; of how many; from how many terms).
    """

    rows: np.ndarray  # (spans, 10) int64
    pieces: int
    sums: int
    lines: np.ndarray
    columns: np.ndarray
    matrices: np.ndarray


class Shape(NamedTuple):
    """The spans of one parameter: where a pointer belongs, what is added to it, in bytes; everything else as it is.

    places: the same of their places, in pieces as they are best added up without and with sums of columns.
    """

    offsets: np.ndarray  # (spans, 12 + parts) int64
    tiles: int
    parts: tuple[Part, ...]
    places: dict[bool, Places]


def parts_of(codecs: Mapping[str, Any], layout: Any) -> list[Part]:
    """The stored parts of a parameter that its kernel reads and writes, in order."""
    geo, ndim, found = layout.geo, len(layout.geo.view), []
    others = parts_by_row(codecs, geo.view)
    for name, part in part_specs(codecs, layout).items():
        if name in others:
            continue
        if part.dims is None or len(part.dims) == ndim:
            columns = 1 if part.dims is None else part.dims[-1][1]
            blocks = -(-geo.view[-1] // columns) if part.reducible and geo.straddles(columns) else 0
            found.append(Part(name, part.dtype.itemsize, columns, all=blocks))
        else:
            found.append(Part(name, part.dtype.itemsize, line="column" if part.dims[-1][0] == ndim - 1 else "row"))
    return found


def shape_of(geo: Geometry, key: Key, parts: list[Part], p_bytes: int, g_bytes: int, cut: Pieces = CPU) -> Shape:
    """One span for every run of rows and of columns; one row of everything where no place matters."""
    if not key.placed:
        ld = prod(geo.local)
        pieces = [((0, 0, 1), (0, 0, ld))] if ld else []
    else:
        ld = geo.local[-1]
        rows = in_matrices(row_runs(geo), geo.local[-2]) if key.factored else row_runs(geo)
        columns = (
            apart(column_runs(geo), sorted({min(256, *key.blocks), *key.blocks})) if key.across else column_runs(geo)
        )
        pieces = [(these, those) for these in rows for those in columns]
    offsets = np.zeros((len(pieces), PARTS + max(1, len(parts))), dtype=np.int64)  # Span has one pointer at least
    tiles = 0
    for i, ((row, row0, n_rows), (col, col0, n_cols)) in enumerate(pieces):
        offsets[i, ROWS:PARTS] = (n_rows, n_cols, row0, col0, ld, geo.view[-1], tiles)
        offsets[i, P] = (row * ld + col) * p_bytes
        offsets[i, G] = (row * ld + col) * g_bytes
        matrix = row // geo.local[-2] if key.factored else 0
        for j, part in enumerate(parts):
            entry = row * part.all if part.all else row * -(-ld // part.columns) + col // part.columns
            offsets[i, PARTS + j] = {"row": row, "column": matrix * ld + col}.get(part.line, entry) * part.bytes
        tiles += n_rows * -(-n_cols // key.tile)
    kinds = {cut.kind(key, asked) for asked in key.rounds}
    return Shape(offsets, tiles, tuple(parts), {by: places_of(geo, key, pieces, cut, by) for by in kinds})


def places_of(geo: Geometry, key: Key, spans: list[Any], cut: Pieces, by_column: bool) -> Places:
    """Where spans, pairs of a run of rows and one of columns, lie in the parameter and in its sums.

    The sums of one row of all column runs follow each other, those of one column of all row runs of its matrix too, so
    that what they come to is a sum of equally distant terms.
    """
    found = np.zeros((len(spans), PIECE0 + 1), dtype=np.int64)
    by_row = any(sums_rows(asked) for asked in key.rounds if cut.kind(key, asked) == by_column)
    lines: dict[int, list[int]] = {}
    columns: dict[int, list[int]] = {}
    matrices: dict[int, list[int]] = {}
    pieces = sums = 0
    for i, ((row, _, rows), (col, _, cols)) in enumerate(spans):
        matrix = row // geo.local[-2] if key.factored else 0
        column = matrix * geo.local[-1] + col
        high, wide = cut.sides(key, cols, by_column)
        down, across = -(-rows // high), -(-cols // wide)
        held = matrix if len(geo.local) > 2 else -1
        found[i] = (0, held, row, column, high, wide, across, sums, 0, pieces)
        if by_row:
            lines.setdefault(row, [sums, row, rows, 0])[-1] += across
            sums += across * rows
        columns.setdefault(column, [0, column, cols, 0])[-1] += down
        matrices.setdefault(matrix, [pieces, matrix, 1, 0])[-1] += down * across
        pieces += down * across
    for column, told in columns.items() if by_column else ():
        told[0] = sums
        for i in np.flatnonzero(found[:, COLUMN] == column).tolist():
            found[i, COLS0] = sums
            sums += told[2] * -(-spans[i][0][2] // int(found[i, HIGH]))
    return Places(found, pieces, sums, *(table_of(told.values()) for told in (lines, columns, matrices)))


def table_of(rows: Iterable[Sequence[int]]) -> np.ndarray:
    return np.array(list(rows), dtype=np.int64).reshape(-1, 4)


def in_matrices(runs: list[tuple[int, int, int]], rows: int) -> list[tuple[int, int, int]]:
    """Runs of rows cut where a matrix of so many local rows ends."""
    found = []
    for row, row0, length in runs:
        while length:
            here = min(length, rows - row % rows)
            found.append((row, row0, here))
            row, row0, length = row + here, row0 + here, length - here
    return found


def row_runs(geo: Geometry) -> list[tuple[int, int, int]]:
    """(local row, global row, rows) of the flattened leading dims of the view."""
    found = [(0, 0, 1)]
    for size, runs in zip(geo.view[:-1], geo.runs[:-1]):
        held = sum(length for _, length in runs)
        if runs == ((0, size),):
            found = [(local * size, first * size, length * size) for local, first, length in found]
        else:
            below = []
            for local, first, length in found:
                for i in range(length):
                    position = (local + i) * held
                    for start, count in runs:
                        below.append((position, (first + i) * size + start, count))
                        position += count
            found = below
    return [run for run in found if run[2]]


def column_runs(geo: Geometry) -> list[tuple[int, int, int]]:
    """(local column, global column, columns)."""
    found, position = [], 0
    for start, length in geo.runs[-1]:
        if length:
            found.append((position, start, length))
        position += length
    return found


def apart(runs: list[tuple[int, int, int]], sizes: Sequence[int]) -> list[tuple[int, int, int]]:
    """Runs of columns cut so that a piece begins where a block does, or lies within one block, of every size: ascending
    powers of two."""
    found = []
    for column, column0, length in runs:
        for size in sizes:
            here = min(length, -column0 % size)
            if here:
                found.append((column, column0, here))
            column, column0, length = column + here, column0 + here, length - here
        if length:
            found.append((column, column0, length))
    return found
