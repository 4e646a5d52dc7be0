"""What every codec is: how one fp32 tensor is stored between steps, without knowing which rule uses it or where."""

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.codecs.geometry import Geometry

Parts = dict[str, Tensor]  # suffix -> local tensor
Noise = Callable[[], Tensor]  # int32 noise of the local view's shape, the same for every mesh


class Part(NamedTuple):
    """One stored tensor of a slot, named `slot.suffix` (the bare slot name where the suffix is empty).

    dims: None for the parameter's own shape; otherwise, for every dim of the part, the dim of the view that it
    follows and how many of the view's elements share one entry: a scale a block of B is ((0, 1), (1, B)).
    An entry may straddle ranks only if `reducible` (its owner asks for the maximum); a packed byte may not.
    """

    suffix: str
    dtype: torch.dtype
    dims: tuple[tuple[int, int], ...] | None = None
    fill: float = 0
    reducible: bool = False

    def shape(self, shape: tuple[int, ...], view: tuple[int, ...]) -> tuple[int, ...]:
        """Global shape of the part of a parameter of this shape and view."""
        if self.dims is None:
            return tuple(shape)
        return tuple(-(-view[dim] // unit) for dim, unit in self.dims)


@dataclass(frozen=True, kw_only=True)
class Codec:
    """A storage format. Subclasses are frozen, check their options and are listed in `shardopt.codecs.CODECS`.

    name: the string that names it everywhere. signed / non_negative: the kinds of slot it can store.
    min_cols, min_elements: a parameter of fewer than two dims, or smaller than these in its GLOBAL view, is stored
    as fp32 instead. projects: what is read back after a recurrence is the projection, not the fresh value.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    min_cols: ClassVar[int] = 32
    min_elements: ClassVar[int] = 4096
    projects: ClassVar[bool] = False

    def fits(self, view: tuple[int, ...]) -> bool:
        """Whether a parameter of this global view is stored in this format (else fp32)."""
        n = 1
        for size in view:
            n *= size
        return len(view) >= 2 and view[-1] >= self.min_cols and n >= self.min_elements

    def for_slot(self, signed: bool) -> "Codec":
        """This codec with the options that depend on the kind of slot settled (rounding, table)."""
        return self

    @property
    def noisy(self) -> bool:
        """Whether encode draws noise."""
        return False

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored tensors of a slot, in order; the shapes follow from the global view alone."""
        raise NotImplementedError

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        """The stored value: fp32, local view shape. Codes come in the local view's shape."""
        raise NotImplementedError

    def encode(self, x: Any, geo: Geometry, noise: Noise) -> Asking:
        """Generator; returns the Parts of x, the second result of `recur` (fp32, local view shape)."""
        raise NotImplementedError

    def recur(self, parts: Parts, decay: Any, x: Tensor, geo: Geometry, floor: float = 1e-30) -> Asking:
        """Generator for s <- decay * s + x; returns (value that the step uses, what encode will store).

        floor: the smallest mean that a projecting codec divides by; without meaning for the others.
        """
        fresh = self.decode(parts, geo) * decay  # never in place: decode may return the stored tensor itself
        fresh += x
        return fresh, fresh
        yield  # a generator like those that ask

    def describe(self) -> str:
        """Name and options that are not the defaults: `int8(block=128)`; parsed back by `shardopt.codecs.codec`."""
        options = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        return f"{self.name}({options})" if options else self.name
