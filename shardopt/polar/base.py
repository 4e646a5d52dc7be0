"""What every orthogonalizer is, and what happens to a matrix before its iteration and after it."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
from torch import Tensor

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Orthogonalizer:
    """A map from matrices to (nearly) their polar factors: X = U S V^T becomes U f(S) V^T with f near 1.

    x, the result: (..., rows, cols) fp32. The scale of x is without meaning: any finite matrix is right, 0 gives 0,
    a NaN or infinity makes its matrix NaN. x is never changed. On a CPU the bits of a matrix do not depend on the
    batch that it is in.
    """

    name: ClassVar[str]

    @torch.no_grad()
    def __call__(self, x: Tensor) -> Tensor:
        """Raises ValueError unless x is fp32 of two or more dims."""
        if x.ndim < 2 or x.dtype != torch.float32:
            raise ValueError(
                f"{self.name} got a tensor of shape {tuple(x.shape)}, {x.dtype}; it takes (..., rows, cols), float32. "
                "Give vectors to another rule, and convert other dtypes with .float()."
            )
        return self.polar(x) if x.numel() else torch.zeros_like(x)

    def polar(self, x: Tensor) -> Tensor:
        """The same for x of at least one element."""
        raise NotImplementedError

    def flops(self, rows: int, cols: int) -> float:
        """FLOP for one matrix, a symmetric product counted half."""
        raise NotImplementedError

    def key(self) -> str:
        """Name and structure, one word, different for whatever gives different results."""
        raise NotImplementedError

    def describe(self) -> str:
        """Name and options that are not the defaults: `newton_schulz(steps=4)`."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        options = ", ".join(f"{name}={shown(value)}" for name, value in given.items())
        return f"{self.name}({options})" if options else self.name

    def words(self) -> str:
        """For people: `describe` and what matters of the defaults."""
        return self.describe()


def shown(value: Any) -> str:
    """An option as `describe` writes it."""
    return value.describe() if isinstance(value, Orthogonalizer) else repr(value)


def compute_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Of the iteration; "auto": fp16 on CUDA (the rate of bf16, an eighth of its error), fp32 elsewhere."""
    if dtype == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    return DTYPES[dtype]


def per_matrix(x: Tensor, work: Callable[[Tensor], Tensor]) -> Tensor:
    """`work` on (small, large) matrices, large >= small, their largest magnitude in [1/2, 1); then undone.

    On a CPU matrices go one by one, in fresh contiguous memory: bmm and mm differ there in bits (measured, MKL, (7,
    15): the place of a matrix in memory decides). Elsewhere all go together, as (batch, small, large).
    """
    tall = x.shape[-2] > x.shape[-1]
    wide = x.mT if tall else x
    flat = wide.reshape(-1, *wide.shape[-2:])
    if x.device.type == "cpu":
        result = torch.stack([work(scaled(matrix)) for matrix in flat])
    else:
        result = work(scaled(flat))
    result = result.reshape(wide.shape)
    return result.mT.contiguous() if tall else result


def scaled(x: Tensor) -> Tensor:
    """x times the power of two that brings its largest magnitude into [1/2, 1): exact, and squares stay in range."""
    peak = torch.maximum(x.amax(dim=(-2, -1), keepdim=True), -x.amin(dim=(-2, -1), keepdim=True))
    peak = peak.clamp(min=2.0**-126)  # zeros and subnormals: the inverse must be finite
    return (x * (torch.frexp(peak).mantissa / peak)).contiguous()


def norm(x: Tensor) -> Tensor:
    """Frobenius norm, fp32, (..., 1, 1); over rows first, as one long fp32 sum is off by 1e-4."""
    rows = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return torch.linalg.vector_norm(rows, dim=-2, keepdim=True)
