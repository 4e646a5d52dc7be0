"""What every codec is: how one fp32 tensor is stored between steps, without knowing which rule uses it or where."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from shardopt.asks import Asking
from shardopt.codecs.geometry import Geometry
from shardopt.spelling import near

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
    A field with a leading underscore is no option: nobody gives it, `describe` leaves it out.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = True
    non_negative: ClassVar[bool] = True
    min_cols: ClassVar[int] = 32
    min_elements: ClassVar[int] = 4096
    projects: ClassVar[bool] = False

    _signed: bool | None = None  # the slot's, once `for_slot` was called

    def __post_init__(self) -> None:
        """Check the options; every subclass that has some calls its parent's."""

    def fits(self, view: tuple[int, ...]) -> bool:
        """Whether a parameter of this global view is stored in this format (else fp32)."""
        n = 1
        for size in view:
            n *= size
        return len(view) >= 2 and view[-1] >= self.min_cols and n >= self.min_elements

    def for_slot(self, signed: bool) -> "Codec":
        """This codec with the options that depend on the kind of slot settled (rounding, table)."""
        return replace(self, _signed=signed)

    @property
    def slot_signed(self) -> bool:
        """Whether the slot can be negative; where `for_slot` was not called, whether the codec can."""
        return self.signed if self._signed is None else self._signed

    @property
    def noisy(self) -> bool:
        """Whether encode draws noise."""
        return False

    def asks(self, geo: Geometry) -> bool:
        """Whether reading, the recurrence or encoding needs more than the local rows."""
        return self.projects or geo.straddles(getattr(self, "block", 1))

    def parts(self, view: tuple[int, ...]) -> tuple[Part, ...]:
        """The stored tensors of a slot, in order; the shapes follow from the global view alone."""
        raise NotImplementedError

    def decode(self, parts: Parts, geo: Geometry) -> Tensor:
        """The stored value: fp32, local view shape. Codes come in the local view's shape."""
        raise NotImplementedError

    def read(self, parts: Parts, geo: Geometry) -> Asking:
        """Generator; `decode` for whoever can ask: some formats are read only with what all ranks hold."""
        return self.decode(parts, geo)
        yield  # a generator like those that ask

    def encode(self, x: Any, geo: Geometry, noise: Noise) -> Asking:
        """Generator; returns the Parts of x, the second result of `recur` (fp32, local view shape)."""
        raise NotImplementedError

    def recur(self, parts: Parts, decay: Any, x: Tensor, geo: Geometry, floor: float = 1e-30) -> Asking:
        """Generator for s <- decay * s + x; returns (value that the step uses, what encode will store).

        floor: the smallest mean that a projecting codec divides by; without meaning for the others.
        """
        stored = yield from self.read(parts, geo)
        fresh = stored * decay  # never in place: decode may return the stored tensor itself
        fresh += x
        return fresh, fresh

    def describe(self) -> str:
        """Name and options that are not the defaults: `int8(block=128)`; parsed back by `shardopt.codecs.codec`."""
        given = {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default}
        options = ", ".join(f"{name}={value!r}" for name, value in given.items() if not name.startswith("_"))
        return f"{self.name}({options})" if options else self.name


@dataclass(frozen=True, kw_only=True)
class Rounded(Codec):
    """A codec that can round stochastically.

    rounding: "nearest", "stochastic" or "auto": nearest in signed slots, stochastic in non-negative ones. Their
    decay is near 1, so that one step changes a value by less than half a code, and nearest would keep it for ever.
    """

    rounding: str = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rounding not in (known := ("auto", "nearest", "stochastic")):
            raise ValueError(
                f"{self.name} got rounding={self.rounding!r}, but can round 'nearest', 'stochastic' or 'auto' (nearest "
                f"in signed slots, stochastic in non-negative ones). Choose one of them{near(self.rounding, known)}"
            )

    @property
    def stochastic(self) -> bool:
        """Which of the two it is."""
        return self.rounding == "stochastic" or (self.rounding == "auto" and not self.slot_signed)

    @property
    def noisy(self) -> bool:
        return self.stochastic
