"""What a kernel asks of blocks that lie on several ranks, and their numbers: twin of `codecs.blocks.Blocks.largest`.

Every rank holds the numbers of all blocks of its rows. A pass finds the extremes of what is local, in tensors that this
keeps; the writing pass reads the answers; the stored numbers change last, when nobody needs the old ones.
"""

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Max
from shardopt.kernels.key import Key
from shardopt.kernels.twins import LARGEST, LEAST
from shardopt.state import part_name

ASKED = slice(2, 4)  # columns of a `Close` of csrc/step.h


class Blocks:
    """Of all parameters of a call. asks: of every parameter, float32 tensors (..., rows, blocks of a GLOBAL row)."""

    def __init__(self, key: Key, geos: Sequence[Any], device: torch.device) -> None:
        self.key = key
        shapes = [[(*geo.local[:-1], -(-geo.view[-1] // slot.block)) for slot in key.across] for geo in geos]
        sizes = [[prod(shape) for shape in its] for its in shapes]
        self.largest = torch.empty(sum(map(sum, sizes)), device=device)
        found = sum(size for its in sizes for slot, size in zip(key.across, its) if slot.least)
        self.least = torch.empty(found, device=device)
        self.sizes = sizes
        flats = {LARGEST: self.largest, LEAST: self.least}
        begins = dict.fromkeys(flats, 0)
        self.asks: list[tuple[Max, ...]] = []
        for its in shapes:
            asks = []
            for slot, shape in zip(key.across, its):
                for word in slot.words:
                    begin, end = begins[word], begins[word] + prod(shape)
                    asks.append(Max(flats[word][begin:end].view(shape), over=-1))
                    begins[word] = end
            self.asks.append(tuple(asks))

    def begin(self) -> list[list[int]]:
        """Nothing is found yet; where each ask lies, parameter by parameter."""
        self.largest.zero_()
        self.least.fill_(-torch.inf)
        return [[ask.x.data_ptr() for ask in asks] for asks in self.asks]

    def rows(self, stored: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """Rows of a `Close`, without the answers. stored: of every parameter and slot, pointers to its numbers."""
        found = [
            (*(*pointers, 0)[:2], 0, 0, slot.at, size)
            for its, sizes in zip(stored, self.sizes)
            for slot, pointers, size in zip(self.key.across, its, sizes)
        ]
        return np.array(found, dtype=np.int64).reshape(-1, 6)

    def tell(self, rows: np.ndarray, pointers: Sequence[Sequence[int]]) -> None:
        """Where the answers lie, those of every parameter."""
        told = []
        for its in pointers:
            left = iter(its)
            told += [[next(left), next(left) if slot.least else 0] for slot in self.key.across]
        rows[:, ASKED] = np.array(told, dtype=np.int64).reshape(-1, 2)


def stored_by(key: Key, geo: Any, state: Mapping[str, Tensor], codecs: Any) -> list[list[int]]:
    """Pointers to the numbers of a parameter's blocks, slot by slot of those that ask."""
    return [
        [
            state[part_name(slot.slot, part.suffix)].data_ptr()
            for part in codecs[slot.slot].parts(geo.view)
            if part.reducible
        ]
        for slot in key.across
    ]
