"""Newton-Schulz: the polar factor by quintics in X X^T, the iteration of Muon."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.polar.base import DTYPES, Orthogonalizer, compute_dtype, norm, per_matrix
from shardopt.polar.coefficients import Coefficients, default_safety, label, schedule
from shardopt.polar.minimax import Triple
from shardopt.polar.ops import operations
from shardopt.spelling import counted, near

NORMS = ("frobenius", "tight")


@dataclass(frozen=True, kw_only=True)
class Iteration(Orthogonalizer):
    """What the direct form and the Gram form share: the polynomial, its precision, how X is normalised.

    coefficients, steps, safety: see `shardopt.polar.coefficients.schedule`; safety None is that of `default_safety`.
    dtype: of the iteration, "fp32", "bf16", "fp16" or "auto" (fp16 on CUDA, else fp32); the norm is always fp32.
    norm: "frobenius", or "tight": ||X X^T||_F^(1/2), which lies between the spectral and the Frobenius norm and is
    free, as X X^T is there anyway. It saves a step where singular values are of one magnitude, as in momenta that are
    mostly noise, and nothing where one of them dominates.
    eps: least norm to divide by, once the largest magnitude is in [1/2, 1): only a zero matrix meets it. (torch
    compares it with the norm itself, so that there a gradient of norm 1e-9 is left short.)
    """

    coefficients: Coefficients = "quintic"
    steps: int = 5
    dtype: str = "auto"
    norm: str = "frobenius"
    eps: float = 1e-7
    safety: float | None = None

    def __post_init__(self) -> None:
        for option, value, allowed in (("dtype", self.dtype, ("auto", *DTYPES)), ("norm", self.norm, NORMS)):
            if value not in allowed:
                known = f"{', '.join(allowed)}{near(value, allowed)}"
                raise ValueError(f"{self.name} got {option}={value!r}. Choose one of {known}")
        if not 0 < self.eps < 0.5:
            raise ValueError(f"{self.name} got eps={self.eps}; it guards against 0 / 0 and lies in (0, 0.5).")
        if isinstance(self.coefficients, list):
            object.__setattr__(self, "coefficients", nested_tuple(self.coefficients))
        self.triples(torch.float32)

    def triples(self, dtype: torch.dtype) -> tuple[Triple, ...]:
        """(a, b, c) of every step of an iteration in this dtype."""
        safety = self.safety
        if safety is None:
            safety = default_safety(self.coefficients, sixteen_bit=dtype.itemsize == 2)
        return schedule(self.coefficients, self.steps, safety)

    def polar(self, x: Tensor) -> Tensor:
        return per_matrix(x, self.iterate)

    def iterate(self, x: Tensor) -> Tensor:
        """x: fp32, scaled, (small, large) or a batch of them."""
        raise NotImplementedError

    def unit(self, x: Tensor) -> Tensor:
        """x / ||x||_F, in the dtype of the iteration."""
        return (x / norm(x).clamp(min=self.eps)).to(compute_dtype(self.dtype, x.device))

    def tighten(self, x: Tensor, gram: Tensor) -> tuple[Tensor, Tensor]:
        """x and x x^T for the chosen norm, where x has Frobenius norm 1."""
        if self.norm == "frobenius":
            return x, gram
        square = norm(gram).clamp(min=self.eps)
        return (x * square.rsqrt()).to(x.dtype), (gram / square).to(x.dtype)

    def words(self) -> str:
        return f"{self.describe()}: {counted(self.steps, 'step')} of {label(self.coefficients)}"

    def key(self) -> str:
        words = [self.name, label(self.coefficients), f"k{self.steps}", self.dtype]
        words += [self.norm] * (self.norm != "frobenius") + [f"s{self.safety}"] * (self.safety is not None)
        return ".".join(words)


@dataclass(frozen=True, kw_only=True)
class NewtonSchulz(Iteration):
    """The direct form (kellerjordan.github.io/posts/muon): k (3 r^2 L + r^3) FLOP for r x L.

    A = X X^T
    X <- a X + (b A + c A^2) X          k times, from X / norm

    The default is torch.optim.Muon's polynomial, in fp32 or fp16 instead of bf16.
    """

    name: ClassVar[str] = "newton_schulz"

    def iterate(self, x: Tensor) -> Tensor:
        return direct(self, self.unit(x)).float()

    def flops(self, rows: int, cols: int) -> float:
        r, large = sorted((rows, cols))
        return self.steps * (3.0 * r * r * large + r**3)


def direct(form: Iteration, x: Tensor) -> Tensor:
    """All steps of the polynomial on X of Frobenius norm 1."""
    ops = operations(x)
    for step, (a, b, c) in enumerate(form.triples(x.dtype)):
        gram = ops.gram(x)
        if step == 0:
            x, gram = form.tighten(x, gram)
        x = ops.product_add(ops.symmetric(gram, gram, gram, beta=b, alpha=c), x, x, beta=a)
    return x


def nested_tuple(x: Any) -> Any:
    """Lists as tuples, which can be compared and hashed."""
    return tuple(map(nested_tuple, x)) if isinstance(x, (list, tuple)) else x
