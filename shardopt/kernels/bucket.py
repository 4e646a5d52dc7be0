"""A bucket of what asks, taken again: the same calls and the same rounds, whose answers lie where they lay."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from shardopt.kernels.passes import AskingCall


class Bucket:
    """All parameters of one bucket, stepped by kernels in `again`.

    layouts: of its members; members: their positions among the items of the step.
    """

    def __init__(self, calls: Sequence[AskingCall], layouts: Sequence[Any], members: Sequence[int]) -> None:
        self.calls, self.layouts = calls, layouts
        self.members = np.array(members, dtype=np.int64)
        self.rounds: list[Any] | None = None

    def again(
        self, addresses: np.ndarray, totals: Mapping[str, Any], taken: Tensor | None, answers: Any
    ) -> Iterator[None]:
        """The whole step, as `shardopt.engine.drive` takes it: yields while a message of a round is on its way.
        addresses: of the gradients of all the step's items."""
        if self.rounds is None:
            self.rounds = [self.standing(which, answers) for which in range(max(len(c.rounds) for c in self.calls))]
        steps = [call.stepping(addresses[self.members], totals, (), taken) for call in self.calls]
        for standing in self.rounds:
            for step in steps:
                next(step, None)
            standing.start()
            yield
            standing.finish()
        for step in steps:
            next(step, None)

    def standing(self, which: int, answers: Any) -> Any:
        """A round, asked in the order of the positions like the first time; the calls learn where its answers lie."""
        calls = [call for call in self.calls if which < len(call.rounds)]
        asked = {member: asks for call in calls for member, asks in call.asks[which].items()}
        order = [(member, ask) for member in sorted(asked) for ask in asked[member]]
        flats = [flat for call in calls for flat in call.flats]
        standing = answers.standing([(self.layouts[member], ask) for member, ask in order], flats)
        told: dict[int, list[int]] = {}
        for (member, _), pointer in zip(order, standing.pointers):
            told.setdefault(member, []).append(pointer)
        for call in calls:
            call.answered(which, [told[member] for member in call.members])
        return standing
