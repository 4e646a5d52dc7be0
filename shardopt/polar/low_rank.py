"""Low-rank orthogonalization: only the leading directions of a matrix are brought to 1, the rest is dropped."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.polar.base import Orthogonalizer, per_matrix
from shardopt.polar.newton_schulz import NewtonSchulz


@dataclass(frozen=True, kw_only=True)
class LowRank(Orthogonalizer):
    """Low-rank orthogonalization (arXiv 2509.11983).

    Y = X W                        W: (large, rank) signs, a fixed hash of their place
    Y <- X (X^T qr(Y))             power_iterations times
    Q = qr(Y);  result Q work(Q^T X)

    The result has rank min(rank, rows, cols); at full rank it is work(X). Deterministic: from X alone, no generator.
    power_iterations: each costs two products with X and sharpens the choice of directions (spectra that fall slowly).
    """

    name: ClassVar[str] = "low_rank"
    rank: int = 128
    power_iterations: int = 1
    work: Orthogonalizer = field(default=NewtonSchulz())

    def __post_init__(self) -> None:
        if self.rank < 1 or self.power_iterations < 0:
            raise ValueError(
                f"low_rank got rank={self.rank}, power_iterations={self.power_iterations}; rank is at least 1, and "
                "power_iterations at least 0."
            )

    def polar(self, x: Tensor) -> Tensor:
        return self.work(x) if self.rank >= min(x.shape[-2:]) else per_matrix(x, self.project)

    def project(self, x: Tensor) -> Tensor:
        """x: fp32, scaled, (small, large) or a batch of them."""
        q = torch.linalg.qr(x @ signs(x.shape[-1], self.rank, x.device)).Q
        for _ in range(self.power_iterations):
            q = torch.linalg.qr(x @ (x.mT @ q)).Q
        return q @ self.work(q.mT @ x)

    def flops(self, rows: int, cols: int) -> float:
        small, large = sorted((rows, cols))
        if self.rank >= small:
            return self.work.flops(rows, cols)
        products = (3 + 2 * self.power_iterations) * 2.0 * small * large * self.rank
        factorizations = (1 + self.power_iterations) * 4.0 * small * self.rank**2  # Householder, and Q formed
        return products + factorizations + self.work.flops(self.rank, large)

    def key(self) -> str:
        return f"{self.name}{self.rank}.p{self.power_iterations}({self.work.key()})"


def signs(rows: int, cols: int, device: torch.device) -> Tensor:
    """(rows, cols) of +-1, fp32: the top bit of a 32-bit hash of the place, the same on every device and rank."""
    place = torch.arange(rows, device=device)[:, None] * 0x9E3779B1 + torch.arange(cols, device=device) * 0x85EBCA6B
    bits = place & 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        bits = ((bits ^ (bits >> shift)) * factor) & 0xFFFFFFFF
    bits ^= bits >> 16
    return ((bits >> 15 & 1) * 2 - 1).float()
