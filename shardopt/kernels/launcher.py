"""A step on a GPU: spans, numbers and counters packed into the parameters of as few launches as hold them."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels.key import Key
from shardopt.kernels.spans import GROUP, TILE0

ROOM = 4089  # words of 8 bytes after the head of `Packed` in csrc/warp.h; a kernel's parameters hold 32,764 bytes
THREADS, WARPS = 256, 8  # of a CTA
CTAS = 16  # a processor: four waves, so that the last one is short
MOST = 256  # tiles of a CTA


class Driver(Protocol):
    """What starts kernels. processors: of the device."""

    device: torch.device
    processors: int

    def launch(self, kernel: str, ctas: int, parameter: np.ndarray) -> None:
        """Start shardopt_step or shardopt_advance on the current stream; `parameter` is copied before this returns."""


class Launcher:
    """The native step of a key on one device."""

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
        flag = 0 if taken is None else taken.data_ptr()
        values, pointers, alive = self.split(numbers)
        bases = np.append(spans[:, TILE0], tiles)
        for first, last in cuts(spans[:, GROUP], spans.shape[1], values.shape[1] * (1 + (pointers is not None))):
            rows = spans[first:last].copy()
            low, high = int(rows[:, GROUP].min()), int(rows[:, GROUP].max()) + 1
            rows[:, GROUP] -= low
            rows[:, TILE0] -= bases[first]
            here = int(bases[last] - bases[first])
            per = tiles_of_a_cta(here, self.driver.processors)
            found = [values[low:high]] + ([] if pointers is None else [pointers[low:high]])
            words = [part.reshape(-1).view(np.int64) for part in (*found, rows)]
            head = (last - first, here, per, values[low:high].size, pointers is not None, flag)
            self.driver.launch("shardopt_step", -(-here // per), packed(head, words))
        for start in range(0, len(counters), ROOM):  # only now: every kernel above has read them
            some = counters[start : start + ROOM]
            self.driver.launch("shardopt_advance", -(-len(some) // THREADS), packed((len(some), flag), [some]))
        del alive  # the stream's order protects what the allocator gives away from here on

    def split(self, numbers: Sequence[Sequence[float | Tensor]]) -> tuple[np.ndarray, np.ndarray | None, list[Tensor]]:
        """The numbers, the pointers to those on the device, and what these point to."""
        alive: list[Tensor] = []

        def pointer(x: Any) -> int:
            if not isinstance(x, Tensor) or x.device != self.driver.device:
                return 0
            alive.append(x.detach().double())
            return alive[-1].data_ptr()

        pointers = np.array([[pointer(x) for x in row] for row in numbers], dtype=np.int64)
        values = [[0.0 if at else float(x) for x, at in zip(*pair)] for pair in zip(numbers, pointers)]
        return np.array(values, dtype=np.float64), pointers if alive else None, alive


def packed(head: Sequence[int], words: Sequence[np.ndarray]) -> np.ndarray:
    """A kernel's parameter: always all of it, since the driver copies as much as the kernel declares."""
    parameter = np.zeros(6 + ROOM, dtype=np.int64)
    content = np.concatenate([np.array(head, dtype=np.int64), *words])
    parameter[: len(content)] = content
    return parameter


def cuts(groups: np.ndarray, span_words: int, group_words: int) -> Iterator[tuple[int, int]]:
    """Ranges of spans, each of which fits into one launch together with the numbers of its groups."""
    first = 0
    while first < len(groups):
        here = groups[first : first + ROOM // span_words]
        spread = np.maximum.accumulate(here) - np.minimum.accumulate(here) + 1
        words = span_words * np.arange(1, len(here) + 1) + group_words * spread
        count = max(1, int(np.searchsorted(words, ROOM, side="right")))
        yield first, first + count
        first += count


def tiles_of_a_cta(tiles: int, processors: int) -> int:
    """A multiple of its warps; large where there is much to do, since every CTA begins with two powers in float64."""
    share = -(-tiles // (processors * CTAS))
    return min(MOST, max(1, -(-share // WARPS)) * WARPS)
