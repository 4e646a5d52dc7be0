"""A step taken again with nothing but new gradients: what makes the host's share of a step small.

Everything that a step looks up is a function of things that rarely change. A walk compares those things by identity and
address, and where one of them is another this gives way to the full step.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from shardopt.kernels.bucket import Bucket
from shardopt.kernels.call import Call
from shardopt.kernels.native_walk import native
from shardopt.kernels.survey import Survey
from shardopt.kernels.walk import Walk


class Above(NamedTuple):
    """What a step needs from above: the optimizer's `answers`, shardopt.prelude.agreed, shardopt.engine.abreast."""

    answers: Any
    agreed: Callable[..., tuple[dict[str, Tensor], Tensor | None]]
    abreast: Callable[[Iterable[Iterator[None]], Any], None]


class Prelude(NamedTuple):
    """What a step asks in front of the rules: `shares` and `meshes` of shardopt.prelude, and who looks for them."""

    survey: Survey
    shares: Sequence[Any]
    meshes: Sequence[Any]


class Taken(NamedTuple):
    """What kernels did in a step. alone: positions among the step's items of those that ask nothing, which `calls`
    step; buckets: of those that ask."""

    prelude: Prelude | None
    alone: Sequence[int]
    calls: Sequence[Call]
    buckets: Sequence[Bucket]


class Replay:
    """How the last step can be taken again."""

    def __init__(self, groups: Sequence[Any], states: Any, facts: Any, last: Taken) -> None:
        """groups: the optimizer's param groups; facts: see `facts_of`."""
        self.facts, self.last = facts, last
        self.alone: Any = np.array(last.alone, dtype=np.int64) if last.buckets else slice(None)
        self.walk, self.repeated = Walk(groups, states), False

    @property
    def possible(self) -> bool:
        return self.walk.possible

    def run(
        self, groups: Sequence[Any], states: Any, facts: Any, policy: Any, above: Above
    ) -> tuple[Tensor | None] | None:
        """Take the step, unless all ranks skip it: (whether it was taken,). None, with nothing touched and nothing
        asked, where something is not as it was."""
        addresses = self.walk.run(groups, states) if facts == self.facts else None
        if addresses is None:
            return None
        if not self.repeated:  # the first time: a step that is never repeated compiles nothing
            self.walk, self.repeated = native(self.walk), True
        survey, shares, meshes = self.last.prelude or (None, (), ())
        found = survey.run(addresses, policy) if survey is not None else ((), None)
        totals, taken = above.agreed(shares, meshes, *found, above.answers, policy)
        on_host = taken is None or taken.device.type == "cpu"
        if taken is None or not on_host or bool(taken):
            numbers, flag = {**totals, "grad_scale": policy.grad_scale}, None if on_host else taken
            for call in self.last.calls:
                call.run(addresses[self.alone], numbers, flag)
            buckets = (bucket.again(addresses, numbers, flag, above.answers) for bucket in self.last.buckets)
            above.abreast(buckets, above.answers)
        return (taken,)


def facts_of(groups: Sequence[Any], recipes: Sequence[Any], policy: Any) -> Any:
    """What else a step depends on, numbers of the param groups and GradScaler's aside."""
    scaled = policy.grad_scale is not None
    return policy.nonfinite, scaled, [(id(g), id(r), bool(g.get("maximize"))) for g, r in zip(groups, recipes)]
