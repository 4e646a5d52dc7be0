"""One call of a kernel for all parameters of a key: their spans, numbers and step counts side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from shardopt.kernels.key import Key
from shardopt.kernels.spans import GROUP, KEY, PARTS, STEP, TILE0, G, P, Shape
from shardopt.state import KEY as KEY_NAME
from shardopt.state import STEP as STEP_NAME


class Call:
    """Filled by `add`, closed once, then run in every step with fresh gradient pointers.

    members: which of the step's items these are. The pointers of parameters and states are as they were when added.
    """

    def __init__(self, key: Key, function: Any) -> None:
        self.key, self.function = key, function
        self.rows: list[np.ndarray] = []
        self.groups: list[Mapping[str, Any]] = []
        self.steps: list[int] = []
        self.members: list[int] = []
        self.tiles = 0

    def add(self, item: Any, shape: Shape, member: int) -> None:
        """Take one more parameter, the `member`-th of the step's items."""
        if not self.groups or self.groups[-1] is not item.group:
            self.groups.append(item.group)
        step = item.state[STEP_NAME].data_ptr()
        rows = shape.offsets.copy()
        rows[:, P] += item.p.data_ptr()
        rows[:, STEP] = step
        rows[:, KEY] = item.state[KEY_NAME].data_ptr() if KEY_NAME in item.state else 0
        rows[:, GROUP] = len(self.groups) - 1
        rows[:, TILE0] += self.tiles
        for i, name in enumerate(shape.names):
            rows[:, PARTS + i] += item.state[name].data_ptr()
        self.rows.append(rows)
        self.steps.append(step)
        self.members.append(member)
        self.tiles += shape.tiles

    def close(self) -> None:
        """No parameter is added any more."""
        self.spans = np.concatenate(self.rows)
        self.owner = np.repeat(self.members, [len(rows) for rows in self.rows])
        self.inside = self.spans[:, G].copy()  # bytes from a gradient's first element to the span's
        self.counters = np.array(self.steps, dtype=np.int64)

    def run(self, gradients: np.ndarray, totals: Mapping[str, Any]) -> None:
        """gradients: pointers of all items' gradients, int64. totals: what was asked of all parameters, by add-on."""
        if not len(self.spans):
            gradients = np.zeros(1, dtype=np.int64)
        self.spans[:, G] = gradients[self.owner] + self.inside
        numbers = np.array([self.key.numbers(group, totals) for group in self.groups], dtype=np.float64)
        self.function(
            self.spans.ctypes.data, len(self.spans), self.tiles, numbers.ctypes.data, numbers.shape[1],
            self.counters.ctypes.data, len(self.counters), torch.get_num_threads(),
        )  # fmt: skip
