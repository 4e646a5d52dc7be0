"""Gram Newton-Schulz: the same polynomial on the small Gram matrix, so that wide matrices are rarely multiplied."""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from shardopt.polar.minimax import Triple
from shardopt.polar.newton_schulz import Iteration, direct
from shardopt.polar.ops import Operations, operations


@dataclass(frozen=True, kw_only=True)
class Gram(Iteration):
    """The Gram form: 3 r^2 L + 17 r^3 FLOP for five steps on r x L, 6 r^2 L + 14 r^3 with a restart.

    R = X X^T, Q = I
    Z = b R + c R^2
    Q <- Q (Z + a I);  R <- (Z + a I) R (Z + a I)          k times
    result Q X

    restarts: after these steps X <- Q X and R = X X^T afresh. Rounding makes small eigenvalues of R negative and
    later steps multiply those by a^2, so that bf16 without a restart is refused (errors of 2 to 1e6 were measured),
    and 16 bits need one every two or three steps: (2,) up to five steps, (2, 4) for more or for accuracy. Entries past
    the last step have no effect.
    min_aspect: matrices with L < min_aspect r take the direct form: as fast there, and more accurate.
    """

    name: ClassVar[str] = "gram"
    restarts: tuple[int, ...] = (2,)
    min_aspect: float = 1.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if list(self.restarts) != sorted({step for step in self.restarts if step > 0}):
            raise ValueError(f"gram got restarts={self.restarts}; they are increasing step counts, such as (2, 4).")
        if self.dtype == "bf16" and not self.restarts:
            raise ValueError(
                "gram got dtype='bf16' without a restart, which diverges on momenta whose singular values spread. "
                "Give restarts=(2,), or use dtype='fp16' or 'fp32'."
            )
        if self.min_aspect < 1:
            raise ValueError(f"gram got min_aspect={self.min_aspect}; it is at least 1 (1: every matrix in Gram form).")

    def segments(self, dtype: torch.dtype) -> list[tuple[Triple, ...]]:
        """The triples between restarts, of an iteration in this dtype."""
        triples = self.triples(dtype)
        ends = [0, *(step for step in self.restarts if step < self.steps), self.steps]
        return [triples[first:last] for first, last in pairwise(ends)]

    def iterate(self, x: Tensor) -> Tensor:
        wide = x.shape[-1] >= self.min_aspect * x.shape[-2]
        x = self.unit(x)
        if not wide:
            return direct(self, x).float()
        ops = operations(x)
        for index, segment in enumerate(self.segments(x.dtype)):
            gram = ops.gram(x)
            if index == 0:
                x, gram = self.tighten(x, gram)
            x = ops.product(factor(gram, segment, ops), x)
        return x.float()

    @torch.no_grad()
    def gram_factor(self, r: Tensor) -> Tensor:
        """Q with polar factor Q X, from R = X X^T alone (tall X: X Q, from R = X^T X); fp32 or float64 in, fp32 out.

        For a matrix whose small side every rank can hold: R is summed over ranks, X stays where it is. The norm is
        read off R (its trace is ||X||_F^2). Without X nothing can restart, so the steps run in float64: what is left
        is the rounding of R, which blurs singular values below 3e-4 of the norm where R is fp32. X must have been
        scaled so that R is in range; Q then belongs to the scaled X.
        """
        r = r.double()
        square = r.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None] if self.norm == "frobenius" else fro(r)
        square = square.clamp(min=torch.finfo(torch.float32).tiny)
        triples = self.triples(torch.float32)
        flat = (r / square).reshape(-1, *r.shape[-2:])
        q = torch.stack([factor(one, triples, operations(one)) for one in flat]).reshape(r.shape)
        return (q * square.rsqrt()).float()

    def flops(self, rows: int, cols: int) -> float:
        r, large = sorted((rows, cols))
        if large < self.min_aspect * r:
            return self.steps * (3.0 * r * r * large + r**3)
        lengths = [len(segment) for segment in self.segments(torch.float32)]
        cubes = sum(4 * length - 3 for length in lengths)  # Z, Q, R, R a step; no Q in the first, no R in the last
        return len(lengths) * 3.0 * r * r * large + cubes * float(r) ** 3

    def key(self) -> str:
        words = [super().key(), "r" + "_".join(map(str, self.restarts))]
        return ".".join(words + [f"a{self.min_aspect}"] * (self.min_aspect != 1.5))


def factor(r: Tensor, triples: tuple[Triple, ...], ops: Operations) -> Tensor:
    """Q of these steps for R = r, normalised. Powers of R commute, so every product here is symmetric."""
    q = None
    for step, (a, b, c) in enumerate(triples):
        z = ops.symmetric(r, r, r, beta=b, alpha=c)
        if q is None:
            q = z.clone()
            q.diagonal(dim1=-2, dim2=-1).add_(a)
        else:
            q = ops.symmetric(q, z, q, beta=a)
        if step + 1 < len(triples):
            w = ops.symmetric(r, z, r, beta=a)
            r = ops.symmetric(z, w, w, beta=a)
    assert q is not None
    return q


def fro(r: Tensor) -> Tensor:
    """Frobenius norm, (..., 1, 1), in r's dtype."""
    return torch.linalg.matrix_norm(r, keepdim=True)
