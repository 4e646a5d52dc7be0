"""For tests/test_sanitize.py: kernels that keep within their arrays and numbers, and that do not."""

import ctypes
from typing import NamedTuple

import pytest
import torch

from shardopt.kernels import cpu


class Kernel(NamedTuple):
    cpp: str = """extern "C" {
float shardopt_last(const float* x, int n) { return x[n - 1]; }
int shardopt_shifted(int by) { return 1 << by; }
}
"""
    words: str = "for a sanitizer"
    passes: bool = False

    def source(self, backend: str) -> str:
        return self.cpp


@pytest.mark.parametrize("beyond", [0, 1])
def test_last(beyond):
    x = torch.ones(33)
    last = cpu.library(Kernel()).shardopt_last
    last.restype = ctypes.c_float
    last(ctypes.c_void_p(x.data_ptr()), 33 + beyond)


@pytest.mark.parametrize("by", [30, 40])
def test_shifted(by):
    cpu.library(Kernel()).shardopt_shifted(by)
