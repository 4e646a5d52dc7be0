"""The GPU's compiler: keys to cubins through NVRTC, without a GPU or a CUDA toolkit; and what loads and starts them."""

import re
import time
from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import torch

from shardopt.kernels.cache import CSRC, Entry, NoCompiler, name_of, obtained
from shardopt.kernels.key import Key
from shardopt.kernels.launcher import THREADS, Launcher
from shardopt.kernels.pass_launcher import PassLauncher

OPTIONS = ["--std=c++17", "--fmad=false", "--device-as-default-execution-space", "--ptxas-options=-v"]
FAST = "--define-macro=SHARDOPT_FAST=1"  # approximate division in the direction u, never in an encode
OLDEST = (7, 5)
CTAS = (4, 3, 2, 1)  # a processor should hold, at most 64, 80, 128 or 255 registers: the first that spills none


def packages() -> str:
    """What to install: bindings of the CUDA that torch was built for; torch's CUDA wheels bring NVRTC."""
    major = (torch.version.cuda or "13").split(".")[0]
    return f'pip install "cuda-bindings=={major}.*" "nvidia-cuda-nvrtc{"-cu12" if major == "12" else ""}"'


@cache
def bindings() -> tuple[Any, Any, tuple[int, int]]:
    """(cuda.bindings.nvrtc, cuda.bindings.driver, version of NVRTC)."""
    try:
        from cuda.bindings import driver, nvrtc

        result, major, minor = nvrtc.nvrtcVersion()
    except Exception as error:  # a missing library shows as an error of cuda-bindings' own
        raise NoCompiler(f"NVRTC cannot be used ({error}): {packages()}") from None
    if int(result):
        raise NoCompiler(f"NVRTC reports {result}: {packages()}")
    return nvrtc, driver, (major, minor)


def arch_of(capability: tuple[int, int]) -> str:
    """The newest architecture that this NVRTC compiles for and this compute capability runs."""
    nvrtc, _, version = bindings()
    result, known = nvrtc.nvrtcGetSupportedArchs()
    runs = [arch for arch in known if arch // 10 == capability[0] and arch % 10 <= capability[1]]
    if int(result) or not runs or capability < OLDEST:
        raise NoCompiler(f"NVRTC {version} has no kernels for compute capability {capability}: {packages()}")
    return f"sm_{max(runs)}"


def options(arch: str, fast: bool) -> list[str]:
    return [*OPTIONS, f"--gpu-architecture={arch}", *([FAST] if fast else [])]


def entry_of(key: Any, arch: str, fast: bool = False) -> Entry:
    version = ".".join(map(str, bindings()[2]))
    return Entry(name_of("cuda", key.source("cuda"), version, " ".join(options(arch, fast))), ".cubin")


def build(key: Any, arch: str, fast: bool) -> None:
    began = time.perf_counter()
    ctas = dict.fromkeys(key.kernels, CTAS[0])
    while True:
        given = [*options(arch, fast), *(f"--define-macro=SHARDOPT_CTAS_{name}={n}" for name, n in ctas.items())]
        cubin, log = compile_source(key.source("cuda"), given)
        kernels = {name: report_of(log, name) for name in ctas}
        spilling = [name for name, n in ctas.items() if kernels[name]["stack"] and n > CTAS[-1]]
        if not spilling:
            break
        ctas.update({name: CTAS[CTAS.index(ctas[name]) + 1] for name in spilling})
    entry_of(key, arch, fast).write(
        cubin,
        key=key.words,
        cpp=key.cpp,
        seconds=round(time.perf_counter() - began, 3),
        compiler=f"NVRTC {bindings()[2]}",
        options=given,
        report={what: max(report[what] for report in kernels.values()) for what in kernels[next(iter(kernels))]},
        kernels=kernels,
        log=log,
    )


def compile_source(source: str, given: list[str]) -> tuple[bytes, str]:
    """(cubin, the compiler's log). NoCompiler with its words where it refuses."""
    nvrtc = bindings()[0]
    headers = sorted(CSRC.glob("*.h"))
    texts, names = [path.read_bytes() for path in headers], [path.name.encode() for path in headers]
    program = said(nvrtc.nvrtcCreateProgram(source.encode(), b"key.cu", len(headers), texts, names))
    try:
        (result,) = nvrtc.nvrtcCompileProgram(program, len(given), [option.encode() for option in given])
        log = text_of(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).decode(errors="replace")
        if int(result):
            raise NoCompiler(f"NVRTC failed ({result}): {log.strip()[:2000]}")
        return text_of(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def text_of(program: Any, size: Any, read: Any) -> bytes:
    buffer = b" " * said(size(program))
    said(read(program, buffer))
    return buffer.rstrip(b"\0") if size.__name__.endswith("LogSize") else buffer


def said(answer: tuple[Any, ...]) -> Any:
    """The value of a call's answer. RuntimeError with the name of what went wrong."""
    if int(answer[0]):
        raise RuntimeError(f"CUDA reports {answer[0].__class__.__name__}.{answer[0].name}")
    return answer[1] if len(answer) > 1 else None


def report_of(log: str, kernel: str) -> dict[str, int]:
    """What the assembler says of a kernel: registers, and bytes of stack, spills and shared memory."""
    about = log.split(f"Compiling entry function 'shardopt_{kernel}'")[1].split("Compiling entry function")[0]
    wanted = {
        "registers": r"Used (\d+) registers",
        "stack": r"(\d+) bytes stack frame",
        "spill_stores": r"(\d+) bytes spill stores",
        "spill_loads": r"(\d+) bytes spill loads",
        "shared": r"(\d+) bytes smem",
    }
    found = {name: re.search(pattern, about) for name, pattern in wanted.items()}
    return {name: int(match.group(1)) if match else 0 for name, match in found.items()}


def compiled(key: Any, arch: str, fast: bool = False) -> bytes:
    """The cubin of a key, from the cache or made."""
    return obtained(entry_of(key, arch, fast), lambda: build(key, arch, fast))


class Module:
    """The kernels of a cubin on one device, started on torch's current stream there."""

    def __init__(self, cubin: bytes, device: torch.device, kernels: Iterable[str]) -> None:
        self.device = device
        self.driver = bindings()[1]
        self.processors = torch.cuda.get_device_properties(device).multi_processor_count
        with torch.cuda.device(device):
            torch.zeros((), device=device)  # the context exists from here on
            names = [f"shardopt_{kernel}" for kernel in (*kernels, "advance")]
            self.library = said(self.driver.cuLibraryLoadData(cubin, [], [], 0, [], [], 0))
            found = [said(self.driver.cuLibraryGetKernel(self.library, name.encode())) for name in names]
            self.kernels = dict(zip(names, map(int, found)))

    def launch(self, kernel: str, ctas: int, parameter: np.ndarray) -> None:
        """See `launcher.Driver`."""
        pointers = np.array([parameter.ctypes.data], dtype=np.uint64)
        with torch.cuda.device(self.device):
            stream = torch.cuda.current_stream().cuda_stream
            given = (ctas, 1, 1, THREADS, 1, 1, 0, stream, pointers.ctypes.data, 0)
            said(self.driver.cuLaunchKernel(self.kernels[kernel], *given))


@cache
def module(key: Any, device: torch.device, fast: bool = False) -> Module:
    """The kernels of a key on a device (with its index), compiled if they have to be. NoCompiler where they cannot."""
    arch = arch_of(torch.cuda.get_device_capability(device))
    return Module(compiled(key, arch, fast), device, key.kernels)


@cache
def load(key: Key, device: torch.device, fast: bool = False) -> Launcher:
    """The native step of a key on a device, as `module`."""
    launcher = PassLauncher if key.rounds else Launcher
    return launcher(key, module(key, device, fast))
