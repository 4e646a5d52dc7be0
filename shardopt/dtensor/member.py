"""One parameter that wants its matrices whole: what the plan has to know of it, from global facts alone."""

import math
from dataclasses import dataclass, field

from shardopt.dtensor.cost import orthogonalize_flops


@dataclass(frozen=True, kw_only=True)
class Member:
    """A matrix, or a stack of `count` matrices (rows, cols): the last two dims of the parameter's view.

    holders: per matrix the shard position that holds all of it already (experts cut between them); None where its
    elements are cut over the shards. cut: the dim that the shards cut, -2 rows, -1 columns, None for both or neither.
    flops: of one matrix; 0 stands for five steps of its shape. there, back: bytes an element on the wire, to the
    owner and from it. name: what people call it, no part of a plan's digest.
    """

    rows: int
    cols: int
    count: int = 1
    holders: tuple[int, ...] | None = None
    cut: int | None = -2
    flops: float = 0.0
    there: float
    back: float
    name: str = field(default="", repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "count", "flops", "there", "back"):
            if getattr(self, name) < 0:
                raise ValueError(f"Member({name}={getattr(self, name)}): must not be negative")
        if self.cut not in (-2, -1, None):
            raise ValueError(f"Member(cut={self.cut}): allowed are -2 (rows), -1 (columns) and None")
        if self.holders is not None and len(self.holders) != self.count:
            raise ValueError(
                f"Member(holders={self.holders}): {len(self.holders)} holders for {self.count} matrices; give one "
                "shard position a matrix, or None where the elements are cut"
            )
        if not self.flops:
            object.__setattr__(self, "flops", orthogonalize_flops(self.rows, self.cols))

    @property
    def elements(self) -> int:
        """Of one matrix."""
        return self.rows * self.cols

    @property
    def bytes_there(self) -> int:
        """On the wire, of one matrix."""
        return math.ceil(self.elements * self.there)

    @property
    def bytes_back(self) -> int:
        return math.ceil(self.elements * self.back)

    @property
    def long_side_cut(self) -> bool:
        """Whether every shard holds a piece of the long side and all of the short one: what the Gram form needs."""
        long = -2 if self.rows >= self.cols else -1
        return self.holders is None and (self.cut == long or (self.rows == self.cols and self.cut is not None))

    @property
    def shape(self) -> str:
        stack = f"{self.count}x" if self.count > 1 else ""
        return f"{stack}{self.rows}x{self.cols}"
