"""The short cuts of 4-bit formats in calm tiles, each by itself, on numbers where their errors decide."""

import ctypes
import subprocess
from pathlib import Path

import pytest

from shardopt.kernels.cache import CSRC, NoCompiler
from shardopt.kernels.cpu import OPTIONS, compiler
from shardopt.kernels.twins import table_source

PROBES = {"dyn4": 0, "log4": 1, "log4 to nearest": 2, "values of log4": 3}


@pytest.fixture(scope="module")
def probe(tmp_path_factory):
    """(what, how many) -> (wrong ones, those in doubt)."""
    folder = tmp_path_factory.mktemp("calm")
    table = f'#include "platform.h"\nnamespace shardopt {{\n{table_source("Dynamic4")}}}\n'
    (folder / "probe.cpp").write_text(table + f'#include "{Path(__file__).parent / "calm_probe.h"}"\n')
    try:
        command = [compiler()[0], "-O2", *OPTIONS, f"-I{CSRC}", "probe.cpp", "-o", "probe.so"]
    except NoCompiler as why:
        pytest.skip(str(why))
    subprocess.run(command, cwd=folder, check=True)
    run = ctypes.CDLL(str(folder / "probe.so")).probe
    run.restype = ctypes.c_longlong

    def call(what, count):
        doubts = ctypes.c_longlong()
        wrong = run(PROBES[what], ctypes.c_longlong(count), ctypes.c_ulonglong(7), ctypes.byref(doubts))
        return wrong, doubts.value

    return call


@pytest.mark.parametrize("what", PROBES)
def test_what_is_not_in_doubt_is_right(probe, what):
    """Kills: a margin of 0 (dyn4) or 2 (log4), midpoints off by 2000 of 2^28, logarithms of a block off by 2^-20, a 2^y
    whose rounding to float32 is not looked at."""
    count = 100_000 if what.startswith("values") else 2_000_000
    wrong, doubts = probe(what, count)
    assert wrong == 0 and doubts > 0
