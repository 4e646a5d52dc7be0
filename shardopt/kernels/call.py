"""One call of a kernel for all parameters of a key: their spans, numbers and step counts side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from shardopt.kernels.key import Key
from shardopt.kernels.spans import GROUP, KEY, PARTS, STEP, TILE0, G, P, Shape
from shardopt.state import KEY as KEY_NAME
from shardopt.state import STEP as STEP_NAME


class Call:
    """Filled by `add`, closed once, then run in every step with fresh gradient pointers.

    members: which of the step's items these are. The pointers of parameters and states are as they were when added.
    """

    def __init__(self, cpp: str, function: Any) -> None:
        self.cpp, self.function = cpp, function
        self.rows: list[np.ndarray] = []
        self.groups: list[tuple[Key, Mapping[str, Any]]] = []  # the key knows where the group's numbers come from
        self.steps: list[int] = []
        self.members: list[int] = []
        self.tiles = 0

    def add(self, item: Any, key: Key, shape: Shape, member: int) -> None:
        """Take one more parameter, the `member`-th of the step's items."""
        group = self.numbers_of(item)
        if not self.groups or self.groups[-1][0] is not key or self.groups[-1][1] is not group:
            self.groups.append((key, group))
        step = item.state[STEP_NAME].data_ptr()
        rows = shape.offsets.copy()
        rows[:, P] += item.p.data_ptr()
        rows[:, STEP] = step
        rows[:, KEY] = item.state[KEY_NAME].data_ptr() if KEY_NAME in item.state else 0
        rows[:, GROUP] = len(self.groups) - 1
        rows[:, TILE0] += self.tiles
        for i, part in enumerate(shape.parts):
            rows[:, PARTS + i] += item.state[part.name].data_ptr()
        self.rows.append(rows)
        self.steps.append(step)
        self.members.append(member)
        self.tiles += shape.tiles

    def numbers_of(self, item: Any) -> Mapping[str, Any]:
        """Where an item's numbers come from, the same object for all that share them."""
        return item.group

    def close(self) -> None:
        """No parameter is added any more."""
        self.spans = np.concatenate(self.rows)
        self.owner = np.repeat(self.members, [len(rows) for rows in self.rows])
        self.inside = self.spans[:, G].copy()  # bytes from a gradient's first element to the span's
        self.counters = np.array(self.steps, dtype=np.int64)

    def run(self, gradients: np.ndarray, totals: Mapping[str, Any], taken: Tensor | None = None) -> None:
        """gradients: pointers of all items' gradients, int64. totals: what was asked of all parameters, by add-on.
        taken: 0-d bool on the device, False: nothing is written."""
        self.function(self.spans, self.tiles, self.numbers(gradients, totals), self.counters, taken)

    def numbers(self, gradients: np.ndarray, totals: Mapping[str, Any]) -> list[list[Any]]:
        """The numbers of every group, once the spans have these gradients."""
        self.spans[:, G] = gradients[self.owner] + self.inside
        return [key.numbers(group, totals) for key, group in self.groups]
