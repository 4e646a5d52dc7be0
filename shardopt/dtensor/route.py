"""Who sends what of a round's matrices to whom: read off the plan by every rank for itself, in one order for all."""

from collections.abc import Sequence
from typing import NamedTuple

from shardopt.codecs.geometry import Runs
from shardopt.dtensor.held import runs_of
from shardopt.dtensor.task import Task


class Parcel(NamedTuple):
    """Matrices of one parameter that go one way. task: position in the route. matrices: among those that this rank
    holds of the parameter and `peer` works on; or among those that this rank works on and `peer` holds."""

    task: int
    peer: int
    matrices: Runs


class Route:
    """What this rank sends and gets in a round.

    held: by replica, what this rank holds of the matrices that owners in it work on; where replicas repeat each other,
    each has its own. gathered: of the matrices that this rank works on, what everyone in the team holds. owned: task ->
    their number. silent: by global facts, nobody in the team sends another anything.
    """

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = tasks
        self.team, self.replicas = tasks[0].team, tasks[0].replicas
        self.shared = tasks[0].plan.shared
        self.held: list[list[Parcel]] = [[] for _ in range(self.replicas.size)]
        self.gathered: list[Parcel] = []
        self.owned: dict[int, int] = {}
        self.silent = all(task.owners_hold for task in tasks)
        for i, task in enumerate(tasks):
            self.leave(i, task)
            self.arrive(i, task)

    def leave(self, i: int, task: Task) -> None:
        """What this rank holds, by owner."""
        held = task.held[self.team.position]
        found: dict[int, list[int]] = {}
        for k, matrix in enumerate(() if held.empty else held.matrices):
            found.setdefault(task.owners[matrix], []).append(k)
        for position, matrices in found.items():
            replica, owner = divmod(position, self.team.size)
            self.held[replica if self.shared else self.replicas.position].append(Parcel(i, owner, runs_of(matrices)))

    def arrive(self, i: int, task: Task) -> None:
        """What this rank works on, by holder."""
        here = self.team.position + (self.replicas.position * self.team.size if self.shared else 0)
        mine = [matrix for matrix, owner in enumerate(task.owners) if owner == here]
        for holder, held in enumerate(task.held if mine else ()):
            matrices = [] if held.empty else [k for k, matrix in enumerate(mine) if matrix in held.members]
            if matrices:
                self.owned[i] = len(mine)
                self.gathered.append(Parcel(i, holder, runs_of(matrices)))
