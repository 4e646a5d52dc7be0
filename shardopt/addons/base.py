"""What every add-on is: something done to the gradient, the direction or the decay, at ONE declared stage."""

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from shardopt.asks import Asking, Slot, Total
from shardopt.rules.base import Hyper


@dataclass(frozen=True, kw_only=True)
class Addon:
    """An add-on. Subclasses are frozen and override the ONE method of their stage; all of them are generators.

    stage: "gradient" (before the rule), "direction" (on u, after it) or "decay" (a term from p and u, times the
    learning rate). order: add-ons of one stage run in ascending order, however the user listed them.
    excludes: names that it cannot be combined with. asks: whether its method asks anything. before_round: asks for a
    Total in front of all rules.
    """

    name: ClassVar[str]
    stage: ClassVar[str]
    order: ClassVar[int] = 0
    excludes: ClassVar[tuple[str, ...]] = ()
    asks: ClassVar[bool] = False
    before_round: ClassVar[bool] = False

    def slots(self) -> tuple[Slot, ...]:
        return ()

    def defaults(self) -> dict[str, Any]:
        """Numbers that the add-on reads from the param group."""
        return {}

    def before(self, g: Tensor) -> Total:
        """What is summed over all parameters before any rule runs; the answer is h.totals[name]."""
        raise NotImplementedError

    def gradient(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        raise NotImplementedError

    def direction(self, p: Tensor, g: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        raise NotImplementedError

    def decay(self, p: Tensor, u: Tensor, s: Any, h: Hyper) -> Asking:
        raise NotImplementedError

    def key(self) -> str:
        """Name and structure, without numbers: `cautious.all`."""
        words = [getattr(self, f.name) for f in fields(self) if getattr(self, f.name) != f.default]
        return ".".join([self.name, *(word for word in words if isinstance(word, str))])

    def describe(self) -> str:
        """Name and options that are not the defaults: `rms_clip(d=0.5)`."""
        options = ", ".join(
            f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if getattr(self, f.name) != f.default
        )
        return f"{self.name}({options})" if options else self.name
