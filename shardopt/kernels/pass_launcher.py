"""A step that asks, on a GPU: its passes and what lies between them, in the parameters of as few launches as hold them.

Nothing is uploaded or read back: sums, answers and scratch memory stay on the device, and their addresses travel in the
parameters of launches, which a CUDA graph keeps.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels.launcher import ROOM, Launcher, Numbers, cuts, flag_of, packed
from shardopt.kernels.spans import GROUP, PARAMETER, PIECE0, TILE0

OF_SETTLE = 3  # the column of its group
TOLD = 2  # words of `Told` in csrc/passes.h
NONE = Numbers(np.zeros((1, 0)), None, [])


class PassLauncher(Launcher):
    """The native step of a key that asks, on one device."""

    def sums(self, which: int, spans: np.ndarray, numbers: Numbers, asked: Any, taken: Tensor | None) -> None:
        """What is asked in round `which`, added up over what is local. asked: of `shardopt.kernels.passes`."""
        scratch = torch.empty(asked.scratch, dtype=torch.float64, device=self.driver.device)
        self.walk(which, spans, numbers, asked, taken, scratch.data_ptr())
        self.start("gather", asked.gathers.rows, asked.gathers.ctas, taken=taken, scratch=scratch.data_ptr())

    def write(
        self, spans: np.ndarray, tiles: int, numbers: Numbers, counters: np.ndarray, taken: Tensor | None, asked: Any
    ) -> None:
        """The step itself, once all rounds are answered."""
        self.walk(len(self.key.rounds), spans, numbers, asked, taken)
        settles = asked.settles
        self.start("settle", settles.rows, settles.ctas, numbers, OF_SETTLE, taken=taken)
        self.start("close", asked.closes.rows, asked.closes.ctas, taken=taken)
        self.advance(counters, flag_of(taken))

    def walk(
        self, which: int, spans: np.ndarray, numbers: Numbers, asked: Any, taken: Tensor | None, scratch: int = 0
    ) -> None:
        """One pass over everything, a CTA a piece."""
        rows = np.concatenate([spans, asked.places], axis=1)
        rows[:, TILE0] = asked.places[:, PIECE0]
        owner = spans.shape[1] + PARAMETER
        self.start(f"pass{which}", rows, asked.pieces, numbers, GROUP, asked.answers, owner, taken, scratch)

    def start(
        self,
        kernel: str,
        rows: np.ndarray,
        ctas: int,
        numbers: Numbers = NONE,
        group: int | None = None,
        answers: np.ndarray | None = None,
        owner: int | None = None,
        taken: Tensor | None = None,
        scratch: int = 0,
    ) -> None:
        """Start a kernel for `ctas` CTAs, whose rows end with the number of CTAs before them. group, owner: the columns
        that say whose numbers and whose answers a row needs."""
        begins = np.append(rows[:, -1], ctas)
        shared = [] if group is None else [(rows[:, group], numbers.words)]
        shared += [] if answers is None else [(rows[:, owner], answers.shape[1])]
        for first, last in cuts(rows, shared, ROOM - TOLD):
            some = rows[first:last].copy()
            low, high = based(some, group)
            told = np.array([begins[first], scratch], dtype=np.int64)
            words = [*numbers.of(low, high), told, some]
            if answers is not None:
                words.append(answers[slice(*based(some, owner))])
            head = (last - first, 0, 0, numbers.values[low:high].size, numbers.pointers is not None, flag_of(taken))
            if begins[last] > begins[first]:
                self.driver.launch(f"shardopt_{kernel}", int(begins[last] - begins[first]), packed(head, words))


def based(rows: np.ndarray, column: int | None) -> tuple[int, int]:
    """The range of a column's indices, which then count from its beginning."""
    if column is None:
        return 0, 0
    low, high = int(rows[:, column].min()), int(rows[:, column].max()) + 1
    rows[:, column] -= low
    return low, high
