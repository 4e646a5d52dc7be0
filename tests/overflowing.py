"""For tests/test_sanitize.py: a kernel that reads an array, and one that reads a number too many."""

import ctypes
from typing import NamedTuple

import pytest
import torch

from shardopt.kernels import cpu


class Kernel(NamedTuple):
    cpp: str = 'extern "C" float shardopt_last(const float* x, int n) { return x[n - 1]; }\n'
    words: str = "the last of n"
    passes: bool = False

    def source(self, backend: str) -> str:
        return self.cpp


@pytest.mark.parametrize("beyond", [0, 1])
def test_last(beyond):
    x = torch.ones(33)
    last = cpu.library(Kernel()).shardopt_last
    last.restype = ctypes.c_float
    last(ctypes.c_void_p(x.data_ptr()), 33 + beyond)
