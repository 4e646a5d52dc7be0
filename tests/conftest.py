"""Kernels are compiled with -O1, in two thirds of the time, but for tests marked `shipped`: what users get."""

from functools import cache

import pytest

from shardopt.kernels import cpu, native_walk, replay, survey
from shardopt.kernels.replay import Replay

QUICK = [*cpu.OPTIONS, "-O1"]  # of several the last counts
# what remembers the kernels of a process
MADE = [(cpu, "library"), (cpu, "load"), (survey, "native"), (native_walk, "library")]
REMEMBERED = [(module, name, cache(getattr(module, name).__wrapped__)) for module, name in MADE]


@pytest.fixture(autouse=True)
def quickly_compiled(request):
    """For one test, with kernels of its own: those of other options are other kernels."""
    with pytest.MonkeyPatch.context() as patched:
        if request.node.get_closest_marker("shipped") is None:
            patched.setattr(cpu, "OPTIONS", QUICK)
            for module, name, remembering in REMEMBERED:
                patched.setattr(module, name, remembering)
        yield


@pytest.fixture
def taken(monkeypatch):
    """For every attempt at the short way of a repeated step, whether it was taken."""
    counted = []
    run = Replay.run

    def counting(self, *given):
        result = run(self, *given)
        counted.append(result is not None)
        return result

    monkeypatch.setattr(Replay, "run", counting)
    return counted


@pytest.fixture(params=["native", "python"])
def walking(request, monkeypatch):
    """Repeated steps are compared natively, and as where there is no compiler."""
    if request.param == "python":
        monkeypatch.setattr(replay, "native", lambda walk: walk)
