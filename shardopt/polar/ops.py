"""The four operations that every orthogonalizer is written in, and the backends that supply them.

A symmetric result costs half where the backend computes one triangle and mirrors it. Every backend gives a result
that depends on nothing but the operands.
"""

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

LEAST = 384  # rows; smaller products on a CPU gain nothing from panels


class Operations:
    """torch on any device: whole products. Matrices are (rows, cols) or (batch, rows, cols), of one dtype."""

    def gram(self, x: Tensor) -> Tensor:
        """x x^T."""
        return x @ x.mT

    def symmetric(self, a: Tensor, b: Tensor, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """beta add + alpha a b for symmetric a, b and add, where a and b commute, so that the result is symmetric."""
        return self.product_add(a, b, add, beta, alpha)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a b."""
        return a @ b

    def product_add(self, a: Tensor, b: Tensor, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        """beta add + alpha a b."""
        fused = torch.addmm if a.ndim == 2 else torch.baddbmm
        return fused(add, a, b, beta=beta, alpha=alpha)


class Panels(Operations):
    """torch on a CPU, single matrices: of symmetric results only the lower triangle, in four panels of rows.

    5/8 of the FLOP of the whole product; measured at 1024 rows .69 of its time. Eight panels reach .64 on an idle
    machine, and lose more than that on a busy one, where threads wait for each other at the end of every call.
    """

    def gram(self, x: Tensor) -> Tensor:
        if x.ndim != 2 or x.shape[0] < LEAST:
            return super().gram(x)
        out = x.new_empty(x.shape[0], x.shape[0])
        for first, last in panels(x.shape[0]):
            torch.mm(x[first:last], x[:last].mT, out=out[first:last, :last])
            out[:first, first:last] = out[first:last, :first].mT
        return out

    def symmetric(self, a: Tensor, b: Tensor, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        if a.ndim != 2 or a.shape[0] < LEAST:
            return super().symmetric(a, b, add, beta, alpha)
        out = torch.empty_like(a)
        for first, last in panels(a.shape[0]):
            panel = out[first:last, :last]
            torch.addmm(add[first:last, :last], a[first:last], b[:, :last], beta=beta, alpha=alpha, out=panel)
            out[:first, first:last] = panel[:, :first].mT
        return out


class Quack(Operations):
    """Symmetric kernels of the installed package quack, for 16-bit formats on GPUs of capability 9 and above."""

    def __init__(self, interface: Any) -> None:
        self.interface = interface  # quack.gemm_interface

    def gram(self, x: Tensor) -> Tensor:
        return self.interface.gemm_symmetric(x, x.mT)

    def symmetric(self, a: Tensor, b: Tensor, add: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        return self.interface.gemm_symmetric(a, b, C=add, alpha=float(alpha), beta=float(beta))


TORCH, CPU = Operations(), Panels()


def operations(x: Tensor) -> Operations:
    """The backend for a matrix or batch (..., rows, cols) of this device, dtype and shape."""
    if x.device.type == "cpu":
        return CPU
    sixteen_bytes = x.shape[-2] % 8 == 0 and x.shape[-1] % 8 == 0  # rows that its loads can address
    if x.device.type == "cuda" and x.dtype in (torch.float16, torch.bfloat16) and sixteen_bytes:
        return quack(x.device) or TORCH
    return TORCH


@lru_cache
def quack(device: torch.device) -> Quack | None:
    """The backend where the package is installed and the GPU has its kernels, else None."""
    if torch.cuda.get_device_capability(device)[0] < 9:
        return None
    try:
        from quack import gemm_interface
    except ImportError:
        return None
    return Quack(gemm_interface)


def panels(rows: int) -> list[tuple[int, int]]:
    """First and last row of every panel, from the shape alone; whole multiples of 64 rows, at least 128."""
    size = max(-(-rows // 256) * 64, 128)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]
