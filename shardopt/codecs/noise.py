"""Counter-based noise: a function of (key, step, stream, GLOBAL row, GLOBAL column), never of the mesh.

Every element of a parameter draws 32 bits from mix32(rowkey(row) xor column). The row key is a 64-bit hash
(the finaliser of splitmix64) folded to 32 bits, one value a row, so that the work per element is two multiplies
and three xor-shifts in wrapping int32: the same lines in Python and in C++.
"""

from zlib import crc32

import torch
from torch import Tensor

from shardopt.codecs.geometry import Geometry, Runs

PARAMETER_STREAM = 0


def stream_of(name: str) -> int:
    """The stream of a slot: its noise is independent of the parameter's and of every other slot's."""
    return crc32(name.encode()) | 1


def signed64(x: int) -> int:
    x &= (1 << 64) - 1
    return x - (1 << 64) if x >> 63 else x


GOLDEN = signed64(0x9E3779B97F4A7C15)
MIX_A = signed64(0xBF58476D1CE4E5B9)
MIX_B = signed64(0x94D049BB133111EB)


def mix64(x: Tensor) -> Tensor:
    """Finaliser of splitmix64 on int64, wrapping."""
    x = (x ^ shift_right(x, 30, 64)) * MIX_A
    x = (x ^ shift_right(x, 27, 64)) * MIX_B
    return x ^ shift_right(x, 31, 64)


def mix32(x: Tensor) -> Tensor:
    """A 32-bit finaliser (two multiplies, three xor-shifts) on int32, wrapping."""
    x = (x ^ shift_right(x, 16, 32)) * 0x7FEB352D
    x = (x ^ shift_right(x, 15, 32)) * (0x846CA68B - (1 << 32))
    return x ^ shift_right(x, 16, 32)


def shift_right(x: Tensor, by: int, bits: int) -> Tensor:
    """Logical shift of signed integers: torch's is arithmetic."""
    return (x >> by) & ((1 << (bits - by)) - 1)


def parameter_key(seed: int, position: int) -> int:
    """The int64 key of the parameter at this position over all groups: kept in the state, so that it survives."""
    return int(
        mix64(mix64(torch.tensor(signed64(seed * GOLDEN_STEP + 1), device="cpu")) + signed64(position * GOLDEN_STEP))
    )


GOLDEN_STEP = 0x5851F42D


def indices(runs: Runs, device: torch.device) -> Tensor:
    """Global index of every local entry of one dim, int64."""
    pieces = [torch.arange(first, first + length, device=device) for first, length in runs]
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def draw(key: Tensor, step: Tensor, stream: int, geo: Geometry) -> Tensor:
    """int32 noise of the local view's shape.

    key: 0-d int64; step: 0-d, any number dtype, exact integers; both on the device of the parameter.
    """
    device = key.device
    rows = torch.zeros((), dtype=torch.int64, device=device)
    for size, runs in zip(geo.view[:-1], geo.runs[:-1]):
        rows = rows.unsqueeze(-1) * size + indices(runs, device)
    base = mix64(mix64(key + stream * GOLDEN_STEP) + step.to(torch.int64) * GOLDEN)
    hashed = mix64(rows * GOLDEN + base)
    rowkey = (hashed ^ shift_right(hashed, 32, 64)).to(torch.int32)
    columns = indices(geo.runs[-1], device).to(torch.int32)
    return mix32(rowkey.unsqueeze(-1) ^ columns)
