"""A driver without a GPU: records every launch and, where it is told to, runs the kernel on an emulated one."""

import ctypes

import numpy as np
import pytest
import torch

from shardopt.kernels import cpu
from shardopt.kernels.key import Key
from shardopt.kernels.launcher import Launcher
from shardopt.kernels.pass_launcher import PassLauncher

PROCESSORS = 3  # few, so that small tensors make CTAs of several spans and spans of several CTAs


class FakeDriver:
    """launches: (kernel, CTAs, its parameter) of every launch."""

    device = torch.device("cpu")

    def __init__(self, processors: int = PROCESSORS, library: ctypes.CDLL | None = None) -> None:
        self.processors, self.library = processors, library
        self.launches: list[tuple[str, int, np.ndarray]] = []

    def launch(self, kernel: str, ctas: int, parameter: np.ndarray) -> None:
        assert ctas > 0 and parameter.nbytes <= 32764 and parameter.flags.c_contiguous
        self.launches.append((kernel, ctas, parameter))
        if self.library is not None:
            getattr(self.library, kernel)(ctypes.c_void_p(parameter.ctypes.data), ctypes.c_longlong(ctas))
            assert self.library.shardopt_misaligned() == 0


def emulated(key: Key) -> Launcher:
    launcher = PassLauncher if key.rounds else Launcher
    return launcher(key, FakeDriver(library=cpu.library(key, "emulated")))


@pytest.fixture
def gpu(monkeypatch):
    """Every optimizer of the test steps on the emulated GPU; returns the launchers by the text of their keys."""
    found: dict[str, Launcher] = {}

    def load(key):
        return found.setdefault(key.cpp, emulated(key))

    monkeypatch.setattr(cpu, "load", load)
    return found
