"""How p is written back: p - delta is formed in fp32 and rounded once, the one way or the other."""

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Slot
from shardopt.codecs.plain import Bf16
from shardopt.codecs.rounding import round_stochastic


class Nearest:
    """To the nearest value of p's dtype, ties to even."""

    name: ClassVar[str] = "nearest"

    def slots(self, dtype: torch.dtype) -> tuple[Slot, ...]:
        return ()

    def noisy(self, dtype: torch.dtype) -> bool:
        return False

    def apply(self, p: Tensor, delta: Tensor, s: Any, dtype: torch.dtype, noise: Callable[[], Tensor]) -> Asking:
        """Generator: the new p, in `dtype`. p, delta: fp32, local view."""
        return (p - delta).to(dtype)
        yield


class Stochastic(Nearest):
    """To one of the two neighbours, with the probability that makes the mean exact. fp32 is written as it is.

    The noise is counter-based (shardopt.codecs.noise): the same for every mesh and after a resume.
    """

    name: ClassVar[str] = "stochastic"

    def noisy(self, dtype: torch.dtype) -> bool:
        return dtype in (torch.bfloat16, torch.float16)

    def apply(self, p: Tensor, delta: Tensor, s: Any, dtype: torch.dtype, noise: Callable[[], Tensor]) -> Asking:
        value = p - delta
        return round_stochastic(value, dtype, noise()) if self.noisy(dtype) else value.to(dtype)
        yield


class Kahan(Nearest):
    """To nearest, what was lost being kept in bf16 and added in the next step: 2 more bytes a parameter.

    c <- c - delta ; p' = round(p + c) ; c <- c - (p' - p). Slot kahan.compensation.
    """

    name: ClassVar[str] = "kahan"

    def slots(self, dtype: torch.dtype) -> tuple[Slot, ...]:
        return () if dtype == torch.float32 else (Slot("kahan.compensation"),)

    def apply(self, p: Tensor, delta: Tensor, s: Any, dtype: torch.dtype, noise: Callable[[], Tensor]) -> Asking:
        if not self.slots(dtype):
            return (p - delta).to(dtype)
        c = (yield from s["kahan.compensation"].read()) - delta
        new = (p + c).to(dtype)
        s["kahan.compensation"].set(c - (new.float() - p))
        return new


KAHAN_CODEC = Bf16(rounding="nearest")
WRITES: dict[str, Nearest] = {write.name: write for write in (Nearest(), Stochastic(), Kahan())}
