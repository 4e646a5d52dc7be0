"""What a step must know of all gradients before it begins, in one native call: are they tame, how long are they."""

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt import addons
from shardopt.kernels import cpu

PIECE = 1 << 14  # elements that are summed by themselves; the same in csrc/survey.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
SQUARES = (addons.ClipByGlobalNorm,)  # add-ons that ask for the sum of squares; a subclass may ask for something else
DATA, ELEMENTS, DTYPE, PIECE0 = range(4)  # columns of a row, which mirrors `Gradient` in csrc/survey.h
SOURCE = cpu.Source("survey", "survey of all gradients")


@cache
def native() -> Any:
    """The C function. NoCompiler where it cannot be had."""
    function = cpu.library(SOURCE).shardopt_survey
    pointer, number, flag = ctypes.c_void_p, ctypes.c_longlong, ctypes.c_int
    function.argtypes = [pointer, pointer, number, pointer, ctypes.c_float, flag, flag, flag]
    function.restype = None
    return function


class Survey:
    """A survey of some gradients, which lie elsewhere in every step but keep shapes and dtypes.

    asked: for every answer the positions of the gradients that it sums over.
    """

    def __init__(self, gradients: Sequence[Tensor], asked: Sequence[Any]) -> None:
        self.function = native()
        sizes = np.array([g.numel() for g in gradients], dtype=np.int64)
        pieces = np.maximum(1, -(-sizes // PIECE))
        self.rows = np.zeros((len(sizes), 4), dtype=np.int64)
        self.rows[:, ELEMENTS] = sizes
        self.rows[:, DTYPE] = [DTYPES[g.dtype] for g in gradients]
        self.rows[:, PIECE0] = np.cumsum(pieces) - pieces
        self.owners = np.repeat(np.arange(len(sizes)), pieces)
        self.found = np.zeros((len(self.owners), 2))
        self.asked = [np.array(share.members, dtype=np.int64) for share in asked]

    def run(self, addresses: np.ndarray, policy: Any) -> tuple[list[Tensor], Tensor]:
        """(the sum of squares of every answer, how many elements are wild): 0-d float64, of this rank."""
        self.rows[:, DATA] = addresses
        scale = 1.0 if policy.grad_scale is None else float(policy.grad_scale)
        self.function(
            self.rows.ctypes.data, self.owners.ctypes.data, len(self.owners), self.found.ctypes.data, scale,
            policy.nonfinite == "zero", len(self.asked) > 0, torch.get_num_threads(),
        )  # fmt: skip
        nonfinite, squares = self.found[self.rows[:, PIECE0]].T
        sums = [torch.tensor(squares[members].sum(), dtype=torch.float64) for members in self.asked]
        return sums, torch.tensor(nonfinite.sum(), dtype=torch.float64)


def possible(gradients: Sequence[Tensor], asked: Sequence[Any]) -> bool:
    """Whether a survey can answer: gradients on the CPU, in dtypes and for add-ons that it knows."""
    known = all(type(addon) in SQUARES for share in asked for addon in share.addons)
    return known and bool(gradients) and all(g.device.type == "cpu" and g.dtype in DTYPES for g in gradients)
