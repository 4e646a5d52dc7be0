"""The view of a parameter, and which piece of it is local: pure numbers, from the GLOBAL shape and the cut alone.

The view is the one shape in which rules, codecs and noise see a parameter:

- fewer than two dims: the vector itself, (N,);
- two dims: as it is;
- a stack of matrices (three dims with a last one of at least 32; four or more whose last two are at least 32):
  as it is, (..., rows, cols), every matrix on its own;
- anything else is a convolution: (shape[0], product of the rest).
"""

from dataclasses import dataclass
from math import prod

Runs = tuple[tuple[int, int], ...]  # (first, length) pieces of one dim, in local order


def taken(runs: Runs, first: int, last: int) -> Runs:
    """The local entries first..last-1 of a dim, as runs."""
    found, position = [], 0
    for start, length in runs:
        low, high = max(first, position), min(last, position + length)
        if low < high:
            found.append((start + low - position, high - low))
        position += length
    return tuple(found)


def view_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The view of a parameter of this global shape. A 0-d parameter is a vector of one."""
    shape = tuple(shape)
    if len(shape) <= 1:
        return (prod(shape),)
    if len(shape) == 2 or is_stack(shape):
        return shape
    return (shape[0], prod(shape[1:]))


def is_stack(shape: tuple[int, ...]) -> bool:
    """Whether the last two of three or more dims are matrices of their own (experts, layers)."""
    return len(shape) >= 3 and shape[-1] >= 32 and (len(shape) == 3 or shape[-2] >= 32)


@dataclass(frozen=True)
class Geometry:
    """Where a local piece lies in the view of its parameter.

    view: global view shape. runs: for every view dim, the pieces that are local (one for a contiguous shard,
    several for a strided one, length 0 for an empty one). cuts: for every view dim, the inner boundaries between
    ranks, on ALL ranks (empty: the dim is not cut); a global fact, equal everywhere.
    """

    view: tuple[int, ...]
    runs: tuple[Runs, ...]
    cuts: tuple[tuple[int, ...], ...]

    @property
    def local(self) -> tuple[int, ...]:
        """Local view shape."""
        return tuple(sum(length for _, length in runs) for runs in self.runs)

    @staticmethod
    def whole(shape: tuple[int, ...]) -> "Geometry":
        """Of a parameter that is entirely local; `shape` is the parameter's."""
        view = view_shape(shape)
        return Geometry(view, tuple(((0, n),) for n in view), ((),) * len(view))

    def straddles(self, block: int) -> bool:
        """Whether some block of the last dim lies on more than one rank."""
        return any(cut % block for cut in self.cuts[-1])
