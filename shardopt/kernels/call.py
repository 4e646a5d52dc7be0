"""One call of a kernel for all parameters of a key: their spans, numbers and step counts side by side."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.kernels.key import Key
from shardopt.kernels.spans import GROUP, KEY, PARTS, STEP, TILE0, G, P, Shape
from shardopt.state import KEY as KEY_NAME
from shardopt.state import STEP as STEP_NAME


class Call:
    def __init__(self, key: Key, function: Any) -> None:
        self.key, self.function = key, function
        self.rows: list[np.ndarray] = []
        self.groups: list[Mapping[str, Any]] = []
        self.steps: list[int] = []
        self.alive: list[Tensor] = []  # gradients that had to be copied
        self.tiles = 0

    def add(self, item: Any, shape: Shape) -> None:
        """Take one more parameter. Its state holds the parts in the order of its slots, step and key beside them."""
        grad = item.grad if item.grad.is_contiguous() else item.grad.contiguous()
        self.alive.append(grad)
        if not self.groups or self.groups[-1] is not item.group:
            self.groups.append(item.group)
        rows = shape.offsets.copy()
        rows[:, P] += item.p.data_ptr()
        rows[:, G] += grad.data_ptr()
        rows[:, STEP] = item.state[STEP_NAME].data_ptr()
        rows[:, GROUP] = len(self.groups) - 1
        rows[:, TILE0] += self.tiles
        rows[:, PARTS:] += [t.data_ptr() for name, t in item.state.items() if name not in (STEP_NAME, KEY_NAME)]
        if KEY_NAME in item.state:
            rows[:, KEY] = item.state[KEY_NAME].data_ptr()
        self.rows.append(rows)
        self.steps.append(item.state[STEP_NAME].data_ptr())
        self.tiles += shape.tiles

    def run(self, totals: Mapping[str, Any]) -> None:
        """totals: what was asked of all parameters, by add-on, and `grad_scale`."""
        spans = np.concatenate(self.rows)
        numbers = np.array([self.key.numbers(group, totals) for group in self.groups], dtype=np.float64)
        steps = np.array(self.steps, dtype=np.int64)
        self.function(
            spans.ctypes.data, len(spans), self.tiles, numbers.ctypes.data, numbers.shape[1],
            steps.ctypes.data, len(steps), torch.get_num_threads(),
        )  # fmt: skip
