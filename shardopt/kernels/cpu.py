"""The CPU's compiler: keys to shared libraries through g++ or clang++, loaded with ctypes."""

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from shardopt.kernels.cache import CSRC, Entry, NoCompiler, ensure, name_of, obtained
from shardopt.kernels.key import Key
from shardopt.kernels.spans import CPU

OPTIONS = ["-std=c++17", "-fPIC", "-shared", "-fno-exceptions", "-Wno-psabi"]
OPTIONS += ["-ffp-contract=off", "-fno-math-errno", "-fno-trapping-math"]  # none of them changes a value


class Source(NamedTuple):
    """A header of csrc where the compiler wants a `Key`: one library for all recipes."""

    cpp: str
    words: str
    passes: bool = False

    def source(self, backend: str) -> str:
        return f'#include "{self.cpp}.h"\n'


@cache
def compiler() -> tuple[str, str]:
    """(path, version) of $CXX, g++ or clang++."""
    wanted = os.environ.get("CXX")
    for name in (wanted,) if wanted else ("g++", "clang++"):
        path = shutil.which(name)
        if path is None:
            continue
        try:
            asked = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if asked.returncode == 0:
            return path, asked.stdout.split("\n")[0]
    raise NoCompiler(f"there is no C++ compiler ({f'CXX={wanted}' if wanted else 'g++ or clang++'})")


@cache
def features() -> str:
    """What the processor can do, in the system's words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        return platform.processor()


def machine() -> str:
    """What -march=native depends on."""
    return f"{platform.machine()} {hashlib.sha256(features().encode()).hexdigest()[:16]}"


def options(key: Key | Source) -> list[str]:
    """Kernels that walk a tile more than once are several times as long: they do without what takes g++ longest."""
    brief = key.passes and "clang" not in compiler()[1]
    level = ["-O2", "-ftree-vectorize", "-fvect-cost-model=dynamic"] if brief else ["-O3"]
    native = "-mcpu=native" if platform.machine() in ("aarch64", "arm64") else "-march=native"
    wide = ["-mprefer-vector-width=512"] if "avx512f" in features() else []
    return [*level, *OPTIONS, native, *wide]


def entry_of(key: Key | Source, backend: str = "cpu") -> Entry:
    return Entry(name_of("cpu", key.source(backend), compiler()[1], " ".join(options(key)), machine()), ".so")


def build(keys: Sequence[Key | Source], backend: str = "cpu") -> None:
    """Compile these keys side by side and put them into the cache. NoCompiler with its words where it refuses.

    backend: "cpu", or "emulated", the GPU's kernels on a CPU, for tests.
    """
    with tempfile.TemporaryDirectory(prefix="shardopt-build-") as folder:
        jobs = []
        for i, key in enumerate(keys):
            (Path(folder) / f"{i}.cpp").write_text(key.source(backend))
            jobs.append((key, [compiler()[0], *options(key), f"-I{CSRC}", f"{i}.cpp", "-o", f"{i}.so"]))
        began = time.perf_counter()
        run(folder, [[*command, "-fopenmp"] for _, command in jobs])
        seconds = (time.perf_counter() - began) / len(jobs)
        for i, (key, command) in enumerate(jobs):
            entry_of(key, backend).write(
                (Path(folder) / f"{i}.so").read_bytes(),
                key=key.words,
                cpp=key.cpp,
                seconds=round(seconds, 3),
                compiler=compiler()[1],
                command=" ".join(command[:-3]),
            )


def run(folder: str, commands: list[list[str]]) -> None:
    """All commands, through ninja where there is one and several: it uses every core."""
    ninja = shutil.which("ninja")
    if ninja and len(commands) > 1:
        edges = "".join(f"rule r{i}\n command = {' '.join(c)}\nbuild {c[-2]}: r{i}\n" for i, c in enumerate(commands))
        (Path(folder) / "build.ninja").write_text(edges)
        commands = [[ninja]]
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise NoCompiler(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[:2000]}")


def prepare(keys: Sequence[Key]) -> None:
    """Compile what is missing of several keys side by side, before each is loaded."""
    wanted = {key.cpp: key for key in keys}
    entries = {cpp: entry_of(key) for cpp, key in wanted.items()}
    ensure(entries, lambda missing: build([wanted[cpp] for cpp in missing]))


@cache
def library(key: Key | Source, backend: str = "cpu", loader: type[ctypes.CDLL] = ctypes.CDLL) -> ctypes.CDLL:
    """The shared library of a key, compiled if it has to be. loader: PyDLL keeps the GIL in its calls."""
    entry = entry_of(key, backend)
    obtained(entry, lambda: build([key], backend))
    try:
        return loader(str(entry.path))
    except OSError as error:
        raise NoCompiler(f"the compiled kernel {entry.path} cannot be loaded: {error}") from None


@cache
def load(key: Key) -> "Stepper":
    """The native step of a key, compiled if it has to be. NoCompiler where it cannot."""
    return Stepper(library(key))


class Stepper:
    """Calls a native step; the same interface as `launcher.Launcher` and `pass_launcher.PassLauncher`."""

    cut = CPU

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_longlong
        self.step, self.add_up = library.shardopt_step, library.shardopt_pass
        self.step.argtypes = [pointer, number, number, pointer, number, pointer, number, ctypes.c_int, pointer]
        self.add_up.argtypes = [number, pointer, number, pointer, number, ctypes.c_int, pointer]
        self.step.restype = self.add_up.restype = None

    def __call__(
        self,
        spans: np.ndarray,
        tiles: int,
        numbers: Sequence[Any],
        counters: np.ndarray,
        taken: Any = None,
    ) -> None:
        """Step everything, with torch's number of threads. taken: a flag of another device is read (offloading)."""
        self.write(spans, tiles, self.prepared(numbers), counters, taken)

    def prepared(self, numbers: Sequence[Any]) -> np.ndarray:
        """The numbers of every group as `sums` and `write` take them."""
        return np.array([[float(x) for x in row] for row in numbers], dtype=np.float64)

    def sums(self, which: int, spans: np.ndarray, numbers: np.ndarray, asked: Any, taken: Any = None) -> None:
        """What is asked in round `which`, added up over what is local."""
        scratch = np.empty(asked.scratch)
        besides = told(asked, scratch.ctypes.data)
        self.add_up(
            which, spans.ctypes.data, len(spans), numbers.ctypes.data, numbers.shape[1],
            torch.get_num_threads(), besides.ctypes.data,
        )  # fmt: skip

    def write(
        self, spans: np.ndarray, tiles: int, numbers: np.ndarray, counters: np.ndarray, taken: Any, asked: Any = None
    ) -> None:
        """The step itself; asked: what a kernel that asks is told besides, answers included."""
        if taken is not None and not bool(taken):
            return
        besides = None if asked is None else told(asked)
        self.step(
            spans.ctypes.data, len(spans), tiles, numbers.ctypes.data, numbers.shape[1], counters.ctypes.data,
            len(counters), torch.get_num_threads(), None if besides is None else besides.ctypes.data,
        )  # fmt: skip


def told(asked: Any, scratch: int = 0) -> np.ndarray:
    """The twin of `Asked` in csrc/cpu.h. asked: of `shardopt.kernels.passes`."""
    gathers, settles, closes = asked.gathers.rows, asked.settles.rows, asked.closes.rows
    head = asked.places.ctypes.data, asked.answers.ctypes.data, asked.pieces, scratch
    rest = gathers.ctypes.data, len(gathers), settles.ctypes.data, len(settles), closes.ctypes.data, len(closes)
    return np.array([*head, *rest], dtype=np.int64)
