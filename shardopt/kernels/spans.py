"""Descriptors: what a kernel is told of one parameter, as rows of int64 that mirror `Span` in csrc/step.h."""

from math import prod
from typing import NamedTuple

import numpy as np

from shardopt.codecs.geometry import Geometry
from shardopt.kernels.key import Key

# columns of a row; the pointers of the parts follow
P, G, STEP, KEY, GROUP, ROWS, COLS, ROW0, COL0, LD, TILE0, PARTS = range(12)


class Part(NamedTuple):
    """A stored part of a slot: its name, bytes of an entry, and how many columns share one."""

    name: str
    bytes: int
    columns: int


class Shape(NamedTuple):
    """The spans of one parameter: where a pointer belongs, what is added to it, in bytes; everything else as it is."""

    offsets: np.ndarray  # (spans, 11 + parts) int64
    tiles: int
    names: tuple[str, ...]  # of the parts


def shape_of(geo: Geometry, key: Key, parts: list[Part], p_bytes: int, g_bytes: int) -> Shape:
    """One span for every run of rows and of columns; one row of everything where no place matters."""
    if not key.noisy and not key.blocks:
        ld = prod(geo.local)
        pieces = [((0, 0, 1), (0, 0, ld))] if ld else []
    else:
        ld = geo.local[-1]
        pieces = [(rows, columns) for rows in row_runs(geo) for columns in column_runs(geo)]
    offsets = np.zeros((len(pieces), PARTS + max(1, len(parts))), dtype=np.int64)  # Span has one pointer at least
    tiles = 0
    for i, ((row, row0, n_rows), (col, col0, n_cols)) in enumerate(pieces):
        offsets[i, ROWS:PARTS] = (n_rows, n_cols, row0, col0, ld, tiles)
        offsets[i, P] = (row * ld + col) * p_bytes
        offsets[i, G] = (row * ld + col) * g_bytes
        for j, part in enumerate(parts):
            offsets[i, PARTS + j] = (row * -(-ld // part.columns) + col // part.columns) * part.bytes
        tiles += n_rows * -(-n_cols // key.tile)
    return Shape(offsets, tiles, tuple(part.name for part in parts))


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
