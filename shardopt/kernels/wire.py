"""Codecs of messages: what Muon sends and gets, in one pass over it, with the reference's bits."""

import ctypes
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.codecs import Codec, Geometry
from shardopt.codecs.packed import Packed
from shardopt.kernels import cpu, cuda
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.launcher import CTAS, WARPS, Driver
from shardopt.kernels.native import OFF, say
from shardopt.kernels.twins import NoTwin, codec_twin, tables_source

Parts = dict[str, Tensor]
WIDE, LANE = 256, 8  # columns that a warp and a lane take, see csrc/wire_warp.h


@dataclass(frozen=True)
class Source:
    """The translation unit of one codec, as `cpu` and `cuda` want it."""

    cpp: str
    words: str
    passes: bool = False

    @property
    def kernels(self) -> dict[str, str]:
        """A GPU's kernels, by name, and the structs of csrc that they run."""
        return {"encode": "Encoding<shardopt::Codec>", "decode": "Decoding<shardopt::Codec>"}

    def source(self, backend: str) -> str:
        """The translation unit: `backend` is cpu, cuda or emulated."""
        headers = ["wire"] if backend == "cpu" else [backend, "wire_warp"]
        macro = f"SHARDOPT_{backend.upper()}_TOLD"
        ends = [f"{macro}({name}, shardopt::Message, shardopt::{of})\n" for name, of in self.kernels.items()]
        return (
            "".join(f'#include "{header}.h"\n' for header in headers)
            + f"namespace shardopt {{\n{tables_source(self.cpp)}using Codec = {self.cpp};\n}}\n"
            + ("SHARDOPT_WIRE(shardopt::Codec)\n" if backend == "cpu" else "".join(ends))
        )


def source_of(codec: Codec) -> Source:
    """NoTwin where a codec has none."""
    return Source(codec_twin(codec, ""), f"wire {codec.describe()}")


def fits(codec: Codec, on_cpu: bool) -> bool:
    """Whether a block is no wider than what a warp takes."""
    return on_cpu or getattr(codec, "block", 1) <= WIDE


class OnCpu:
    """The C functions of a codec. Arguments: addresses, rows, columns; into: columns of a block before the first."""

    step = 1  # what `into` must be a multiple of

    def __init__(self, library: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_longlong
        self.to_codes, self.to_floats = library.shardopt_encode, library.shardopt_decode
        self.to_codes.argtypes = [pointer, number, number, pointer, pointer, ctypes.c_int]
        self.to_floats.argtypes = [pointer, pointer, number, number, number, pointer, ctypes.c_int]
        self.to_codes.restype = self.to_floats.restype = None

    def encode(self, x: int, rows: int, cols: int, codes: int, numbers: int) -> None:
        self.to_codes(x, rows, cols, codes, numbers, torch.get_num_threads())

    def decode(self, codes: int, numbers: int, rows: int, cols: int, into: int, x: int) -> None:
        self.to_floats(codes, numbers, rows, cols, into, x, torch.get_num_threads())


class OnGpu:
    """The same as kernels. bytes: of an entry of the codes; columns: that share one."""

    step = LANE

    def __init__(self, driver: Driver, codec: Codec) -> None:
        self.driver = driver
        _, dtype, columns = entries(codec)[0]
        self.bytes, self.columns = dtype.itemsize, columns

    def encode(self, x: int, rows: int, cols: int, codes: int, numbers: int) -> None:
        self.launch("shardopt_encode", x, codes, numbers, rows, cols, 0)

    def decode(self, codes: int, numbers: int, rows: int, cols: int, into: int, x: int) -> None:
        self.launch("shardopt_decode", x, codes, numbers, rows, cols, into)

    def launch(self, kernel: str, x: int, codes: int, numbers: int, rows: int, cols: int, into: int) -> None:
        """Of the twin of `Message` in csrc/wire_warp.h."""
        moved = min(16, LANE * self.bytes // self.columns)
        width = -(-cols // self.columns) * self.bytes
        aligned = (x | cols * 4) % 16 == 0 and (codes | width) % moved == 0
        tiles = rows * -(-(into + cols) // WIDE)
        ctas = min(-(-tiles // WARPS), self.driver.processors * CTAS)
        told = x, codes, numbers, rows, cols, into, aligned, ctas * WARPS
        self.driver.launch(kernel, ctas, np.array(told, dtype=np.int64))


@lru_cache(maxsize=256)
def native(codec: Codec, device: torch.device) -> Any:
    """Compiled if it has to be; None where the reference has to do it, which is said if there is no compiler."""
    if codec.name == "fp32" or not fits(codec, device.type == "cpu"):  # fp32: nothing is done
        return None
    try:
        source = source_of(codec)
        return OnCpu(cpu.library(source)) if device.type == "cpu" else OnGpu(cuda.module(source, device), codec)
    except NoTwin:
        return None
    except NoCompiler as why:
        say(str(why))
        return None


@dataclass(frozen=True)
class Coder:
    """Stands in for `Codec.encode` and `Codec.decode` where it can: of one run of columns, of blocks that lie on one
    rank and bytes that nobody has cut. Then all is local, and nothing is asked. gpus: whether on GPUs too."""

    gpus: bool = False

    def of(self, codec: Codec, x: Tensor, geo: Geometry) -> Any:
        """What does it; None: the reference."""
        here = x.device.type == "cpu" or (self.gpus and x.device.type == "cuda")
        return native(codec, x.device) if here and len(geo.runs[-1]) == 1 and x.numel() else None

    def encode(self, codec: Codec, x: Tensor, geo: Geometry) -> Parts | None:
        """The parts of x, fp32 in the local view `geo`; None where the reference has to do it."""
        does = None if geo.straddles(getattr(codec, "block", 1)) else self.of(codec, x, geo)
        if does is None:
            return None
        *lead, cols = x.shape
        found = {
            suffix: torch.empty((*lead, -(-cols // columns)), dtype=dtype, device=x.device)
            for suffix, dtype, columns in entries(codec)
        }
        x = x.contiguous()
        does.encode(x.data_ptr(), x.numel() // cols, cols, *addresses(found))
        return found

    def decode(self, codec: Codec, parts: Parts, geo: Geometry) -> Tensor | None:
        """fp32, local view shape; None where the reference has to do it."""
        codes, first = next(iter(parts.values())), geo.runs[-1][0][0]
        does = None if isinstance(codec, Packed) and first % 2 else self.of(codec, codes, geo)
        into = first % getattr(codec, "block", 1)
        if does is None or into % does.step:
            return None
        parts = {suffix: part.contiguous() for suffix, part in parts.items()}
        x = torch.empty(geo.local, device=codes.device)
        cols = x.shape[-1]
        does.decode(*addresses(parts), x.numel() // cols, cols, into, x.data_ptr())
        return x


def chosen(fused: bool | None) -> Coder | None:
    """What the optimizer's argument `fused` asks for. Like all kernels, on GPUs only those that were asked for.
    ValueError where it is neither None, True nor False."""
    if fused not in (None, True, False):
        raise ValueError(f"fused is {fused!r}; it must be None, True or False")
    return None if fused is False or OFF else Coder(gpus=fused is True)


@cache
def entries(codec: Codec) -> list[tuple[str, torch.dtype, int]]:
    """Of every part: suffix, dtype, columns that share an entry."""
    return [(part.suffix, part.dtype, part.dims[-1][1] if part.dims else 1) for part in codec.parts((1, 1))]


def addresses(parts: Parts) -> tuple[int, int]:
    """Of codes and of blocks' numbers, 0 where there are none."""
    codes, *numbers = (part.data_ptr() for part in parts.values())
    return codes, numbers[0] if numbers else 0
