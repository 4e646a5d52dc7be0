"""What a rule works out for rows (norms of matrices and of blocks, a second moment a row): by the rule itself, from the
squares that kernels add up along every row."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardopt.asks import Ask, Asking, as_tuple, is_group, result_of
from shardopt.codecs.rows import Rows
from shardopt.rules import Hyper
from shardopt.state import Slots, part_name


class Lines:
    """One parameter's in one step: `asked` and `told` in turn, round by round, then `write`."""

    def __init__(self, rule: Any, group: Mapping[str, Any], geo: Any, state: Mapping[str, Tensor], codecs: Any) -> None:
        """codecs: of all slots; those that have a number a row are read and written here, not by the kernel."""
        self.rule, self.geo = rule, geo
        self.hyper = Hyper(dict(group), shape=geo.view)
        self.slots = Slots(by_row(codecs), state.__getitem__, geo, lambda stream: torch.empty(0), False)
        self.squares: list[Tensor] = []
        self.asking: Asking | None = None
        self.grouped = False

    def asked(self, sums: Tensor) -> tuple[Ask, ...]:
        """sums: float64, (..., rows), squares of what the matrices have become, added up along the local rows."""
        work = self.rule.lines()[len(self.squares)]
        self.squares.append(sums.unsqueeze(-1))
        self.asking = work(self.slots, self.hyper, *self.squares)
        found = next(self.asking)
        self.grouped = is_group(found)
        return as_tuple(found)

    def told(self, replies: Sequence[Tensor]) -> Tensor:
        """What every local row is multiplied with or divided by: (..., rows) float32."""
        assert self.asking is not None
        try:
            self.asking.send(tuple(replies) if self.grouped else replies[0])
        except StopIteration as stop:
            return stop.value.expand(*self.geo.local[:-1], 1).squeeze(-1).contiguous()
        raise AssertionError(f"{self.rule.name} asks twice about the same rows")

    def write(self, taken: Tensor | None) -> None:
        """Store what has a number a row. taken: 0-d bool, False: nothing is written."""
        for target, content in result_of(self.slots.encode()):
            target.copy_(content if taken is None else torch.where(taken.to(target.device), content, target))


def by_row(codecs: Mapping[str, Any]) -> dict[str, Any]:
    """The slots that have a number a row."""
    return {slot: codec for slot, codec in codecs.items() if isinstance(codec, Rows)}


def parts_by_row(codecs: Mapping[str, Any], view: tuple[int, ...]) -> set[str]:
    """The names of what they store."""
    return {part_name(slot, part.suffix) for slot, codec in by_row(codecs).items() for part in codec.parts(view)}
