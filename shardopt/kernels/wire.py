"""Codecs of messages, native on a CPU: what Muon sends and gets in one pass over it, with the reference's bits."""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from shardopt.codecs import Codec, Geometry
from shardopt.codecs.packed import Packed
from shardopt.kernels import cpu
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.native import OFF, say
from shardopt.kernels.twins import TABLES, NoTwin, codec_twin, table_source

Parts = dict[str, Tensor]


@dataclass(frozen=True)
class Source:
    """The translation unit of one codec, as `cpu.library` wants it."""

    cpp: str
    words: str
    passes: bool = False

    def source(self, backend: str) -> str:
        tables = "".join(table_source(name) for name in TABLES if f", {name}>" in self.cpp)
        head = f'#include "wire.h"\nnamespace shardopt {{\n{tables}using Codec = {self.cpp};\n}}\n'
        return head + "SHARDOPT_WIRE(shardopt::Codec)\n"


def source_of(codec: Codec) -> Source:
    """NoTwin where a codec has none."""
    return Source(codec_twin(codec, ""), f"wire {codec.describe()}")


class Functions(NamedTuple):
    encode: Callable[..., None]
    decode: Callable[..., None]


@cache
def functions(codec: Codec) -> Functions | None:
    """Compiled if they have to be; None where the reference has to do it, which is said if there is no compiler."""
    if codec.name == "fp32":
        return None  # nothing is done
    try:
        library = cpu.library(source_of(codec))
    except NoTwin:
        return None
    except NoCompiler as why:
        say(str(why))
        return None
    pointer, number = ctypes.c_void_p, ctypes.c_longlong
    encode, decode = library.shardopt_encode, library.shardopt_decode
    encode.argtypes = [pointer, number, number, pointer, pointer, ctypes.c_int]
    decode.argtypes = [pointer, pointer, number, number, number, pointer, ctypes.c_int]
    encode.restype = decode.restype = None
    return Functions(encode, decode)


class Coder:
    """Stands in for `Codec.encode` and `Codec.decode` where it can: on a CPU, of one run of columns, of blocks that lie
    on one rank and bytes that nobody has cut. Then all is local, and nothing is asked."""

    def encode(self, codec: Codec, x: Tensor, geo: Geometry) -> Parts | None:
        """The parts of x, fp32 in the local view `geo`; None where the reference has to do it."""
        block = getattr(codec, "block", 1)
        if x.device.type != "cpu" or len(geo.runs[-1]) != 1 or geo.straddles(block) or not x.numel():
            return None
        native = functions(codec)
        if native is None:
            return None
        found = {}
        *lead, cols = x.shape
        for suffix, dtype, columns in entries(codec):
            found[suffix] = torch.empty((*lead, -(-cols // columns)), dtype=dtype)
        codes, number = addresses(found)
        x = x.contiguous()
        native.encode(x.data_ptr(), x.numel() // cols, cols, codes, number, torch.get_num_threads())
        return found

    def decode(self, codec: Codec, parts: Parts, geo: Geometry) -> Tensor | None:
        """fp32, local view shape; None where the reference has to do it."""
        codes, first = next(iter(parts.values())), geo.runs[-1][0][0]
        halved = isinstance(codec, Packed) and first % 2
        if codes.device.type != "cpu" or len(geo.runs[-1]) != 1 or halved or not codes.numel():
            return None
        native = functions(codec)
        if native is None:
            return None
        parts = {suffix: part.contiguous() for suffix, part in parts.items()}
        x = torch.empty(geo.local)
        cols = x.shape[-1]
        into = first % getattr(codec, "block", 1)
        native.decode(*addresses(parts), x.numel() // cols, cols, into, x.data_ptr(), torch.get_num_threads())
        return x


def chosen(fused: bool | None) -> Coder | None:
    """What the optimizer's argument `fused` asks for."""
    return None if fused is False or OFF else Coder()


@cache
def entries(codec: Codec) -> list[tuple[str, torch.dtype, int]]:
    """Of every part: suffix, dtype, columns that share an entry."""
    return [(part.suffix, part.dtype, part.dims[-1][1] if part.dims else 1) for part in codec.parts((1, 1))]


def addresses(parts: Parts) -> tuple[int, int]:
    """Of codes and of blocks' numbers, 0 where there are none."""
    codes, *numbers = (part.data_ptr() for part in parts.values())
    return codes, numbers[0] if numbers else 0
