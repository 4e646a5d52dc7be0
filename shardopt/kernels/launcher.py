"""A step on a GPU: spans, numbers and counters packed into the parameters of as few launches as hold them."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels.key import Key
from shardopt.kernels.spans import GPU, GROUP, TILE0

ROOM = 4089  # words of 8 bytes after the head of `Packed` in csrc/warp.h; a kernel's parameters hold 32,764 bytes
THREADS, WARPS = 256, 8  # of a CTA
CTAS = 16  # a processor: four waves, so that the last one is short
MOST = 256  # tiles of a CTA


class Driver(Protocol):
    """What starts kernels. processors: of the device."""

    device: torch.device
    processors: int

    def launch(self, kernel: str, ctas: int, parameter: np.ndarray) -> None:
        """Start a kernel on the current stream; `parameter` is copied before this returns."""


class Numbers(NamedTuple):
    """Of every group: values, and pointers to those that lie on the device, where some do; `alive` holds these."""

    values: np.ndarray
    pointers: np.ndarray | None
    alive: list[Tensor]

    @property
    def words(self) -> int:
        """Of a group, in a launch."""
        return self.values.shape[1] * (1 + (self.pointers is not None))

    def of(self, low: int, high: int) -> list[np.ndarray]:
        """What a launch is given of these groups."""
        return [part[low:high] for part in (self.values, self.pointers) if part is not None]


class Launcher:
    """The native step of a key on one device."""

    cut = GPU

    def __init__(self, key: Key, driver: Driver) -> None:
        self.key, self.driver = key, driver

    def __call__(
        self,
        spans: np.ndarray,
        tiles: int,
        numbers: Sequence[Sequence[float | Tensor]],
        counters: np.ndarray,
        taken: Tensor | None = None,
    ) -> None:
        """Step everything. spans: (n, words) int64, of `tiles` tiles; numbers: of every group, where a 0-d tensor on
        the device is read when the kernel runs; counters: pointers to the step counts; taken: 0-d bool on the device,
        False: nothing is written. Reads nothing back."""
        flag = flag_of(taken)
        split = self.prepared(numbers)
        bases = np.append(spans[:, TILE0], tiles)
        for first, last in cuts(spans, [(spans[:, GROUP], split.words)], ROOM):
            rows = spans[first:last].copy()
            low, high = int(rows[:, GROUP].min()), int(rows[:, GROUP].max()) + 1
            rows[:, GROUP] -= low
            rows[:, TILE0] -= bases[first]
            here = int(bases[last] - bases[first])
            per = tiles_of_a_cta(here, self.driver.processors)
            head = (last - first, here, per, split.values[low:high].size, split.pointers is not None, flag)
            self.driver.launch("shardopt_step", -(-here // per), packed(head, [*split.of(low, high), rows]))
        self.advance(counters, flag)
        del split  # the stream's order protects what the allocator gives away from here on

    def advance(self, counters: np.ndarray, flag: int) -> None:
        """Count the step."""
        for start in range(0, len(counters), ROOM):  # only now: every kernel above has read them
            some = counters[start : start + ROOM]
            self.driver.launch("shardopt_advance", -(-len(some) // THREADS), packed((len(some), flag), [some]))

    def prepared(self, numbers: Sequence[Sequence[float | Tensor]]) -> Numbers:
        """What launches are given of the numbers."""
        alive: list[Tensor] = []

        def pointer(x: Any) -> int:
            if not isinstance(x, Tensor) or x.device != self.driver.device:
                return 0
            alive.append(x.detach().double())
            return alive[-1].data_ptr()

        pointers = np.array([[pointer(x) for x in row] for row in numbers], dtype=np.int64)
        values = [[0.0 if at else float(x) for x, at in zip(*pair)] for pair in zip(numbers, pointers)]
        return Numbers(np.array(values, dtype=np.float64), pointers if alive else None, alive)


def flag_of(taken: Tensor | None) -> int:
    """Its address; 0: a step is taken."""
    return 0 if taken is None else taken.data_ptr()


def packed(head: Sequence[int], words: Sequence[np.ndarray]) -> np.ndarray:
    """A kernel's parameter: always all of it, since the driver copies as much as the kernel declares."""
    parameter = np.zeros(6 + ROOM, dtype=np.int64)
    content = np.concatenate([np.array(head, dtype=np.int64), *(part.reshape(-1).view(np.int64) for part in words)])
    parameter[: len(content)] = content
    return parameter


def cuts(rows: np.ndarray, shared: Sequence[tuple[np.ndarray, int]], room: int) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each of which fits into one launch together with what its rows share.

    shared: (of every row the index of what it shares, words of one such), say of groups.
    """
    count, words = rows.shape
    first = 0
    while first < count:
        most = min(count - first, room // words)
        needed = words * np.arange(1, most + 1)
        for indices, each in shared:
            here = indices[first : first + most]
            needed += each * (np.maximum.accumulate(here) - np.minimum.accumulate(here) + 1)
        fits = max(1, int(np.searchsorted(needed, room, side="right")))
        yield first, first + fits
        first += fits


def tiles_of_a_cta(tiles: int, processors: int) -> int:
    """A multiple of its warps; large where there is much to do, since every CTA begins with two powers in float64."""
    share = -(-tiles // (processors * CTAS))
    return min(MOST, max(1, -(-share // WARPS)) * WARPS)
