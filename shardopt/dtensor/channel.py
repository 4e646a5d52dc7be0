"""The process group of checkpoints: one gloo group of all ranks, so that a save never meets training's collectives.

Collectives of a save under way and of the training beside it, on the same gloo group, wait for each other for ever.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import torch.distributed as dist

T = TypeVar("T")


class Channel:
    """All ranks of a job and what is under way between them. group: None in a job of one process.

    pending: the save that the next one has to wait for.
    """

    def __init__(self, group: Any) -> None:
        self.group = group
        self.pending: Any = None
        self.rank = dist.get_rank(group) if group else 0
        self.world_size = dist.get_world_size(group) if group else 1
        self.no_dist = group is None

    def settle(self) -> None:
        """Wait for the save under way; ValueError if it failed and nobody was told so far."""
        pending, self.pending = self.pending, None
        if pending is not None and not pending.told:
            pending.wait()

    def on_first(self, work: Callable[[], T]) -> T:
        """What work() returns on rank 0, for every rank; its error is raised on every rank."""
        outcome: list[Any] = [attempt(work) if self.rank == 0 else None]
        if not self.no_dist:
            dist.broadcast_object_list(outcome, src=dist.get_global_rank(self.group, 0), group=self.group)
        return results_of(outcome)[0]

    def everywhere(self, work: Callable[[], T]) -> list[T]:
        """What work() returned on every rank, by rank; an error of any rank is raised on all."""
        outcomes: list[Any] = [attempt(work)]
        if not self.no_dist:
            outcomes = outcomes * self.world_size
            dist.all_gather_object(outcomes, outcomes[self.rank], group=self.group)
        return results_of(outcomes)


def attempt(work: Callable[[], T]) -> tuple[T | None, Exception | None]:
    try:
        return work(), None
    except Exception as error:
        return None, error


def results_of(outcomes: Sequence[tuple[Any, Exception | None]]) -> list[Any]:
    for _, error in outcomes:
        if error is not None:
            raise error
    return [result for result, _ in outcomes]


ALONE = Channel(None)
CHANNELS: WeakKeyDictionary[Any, Channel] = WeakKeyDictionary()  # the default process group -> its channel


def channel() -> Channel:
    """The channel of the default process group, made at first use, which all ranks must share."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    world = dist.group.WORLD
    if world not in CHANNELS:
        CHANNELS[world] = Channel(dist.new_group(backend="gloo"))
    return CHANNELS[world]
