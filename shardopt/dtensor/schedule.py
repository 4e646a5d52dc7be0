"""What will be asked whole in a step, planned: buckets and owners; the plan is compared between the ranks, once."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from hashlib import blake2b
from math import prod
from typing import Any

import torch
import torch.distributed as dist

from shardopt.dtensor.held import holdings
from shardopt.dtensor.layout import Layout, describe
from shardopt.dtensor.plan import Plan
from shardopt.dtensor.route import Route
from shardopt.dtensor.task import Task, formats_of, member_of, mode_asked
from shardopt.dtensor.team import ALONE, replica_axes, team_of

Wanted = tuple[Any, Any, str]  # work, wire and mode of a `Whole` that will be asked
Planner = Callable[..., Plan]
ELEMENTS = 1 << 26  # on a rank, of one bucket: what of it does not travel is cut there


@dataclass(frozen=True)
class Schedule:
    """buckets: of positions in what was announced. tasks: by the id of the layout, which they keep alive."""

    buckets: tuple[tuple[int, ...], ...]
    tasks: dict[int, Task]
    routes: dict[tuple[int, ...], Route] = field(default_factory=dict)

    @cached_property
    def messages(self) -> int:
        """The most that one round of matrices sends one after another: there, back; before and after it, rarely."""
        full = [task for task in self.tasks.values() if task.mode == "full"]
        before = any(task.there.codec.asks(task.layout.geo) for task in full)
        return 2 + before + any(task.plan.shared for task in full)

    def route(self, layouts: Sequence[Layout]) -> Route:
        """Of the matrices that are asked in one round."""
        key = tuple(id(layout) for layout in layouts)
        if key not in self.routes:
            self.routes[key] = Route([self.tasks[i] for i in key])
        return self.routes[key]


def schedule(announced: Sequence[tuple[Layout, Wanted]], planner: Planner, counter: Any) -> Schedule:
    """Plan for all parameters that will ask `Whole`; every rank must announce the same ones in the same order.

    One plan for those of one mesh that are sharded over the same axes. counter: gets the `collectives`. ValueError
    where ranks found different plans.
    """
    buckets: list[tuple[int, ...]] = []
    tasks: dict[int, Task] = {}
    for (mesh, sharding), here in places_of(announced).items():
        found = planned([announced[i] for i in here], mesh, sharding, planner, counter)
        for bucket in found[0].plan.buckets:
            buckets.extend(tuple(here[task.member] for task in part) for part in split([found[m] for m in bucket]))
        tasks.update((id(task.layout), task) for task in found)
    return Schedule(tuple(buckets), tasks)


def foreseen(announced: Sequence[tuple[Layout, Wanted]], planner: Planner) -> list[Plan]:
    """The plans that `schedule` will make, without a word between ranks."""
    return [
        plan_here([announced[i] for i in here], mesh, sharding, planner)
        for (mesh, sharding), here in places_of(announced).items()
    ]


def places_of(announced: Sequence[tuple[Layout, Wanted]]) -> dict[Any, list[int]]:
    """(mesh, sharding axes) -> positions: those that are planned together."""
    places: dict[Any, list[int]] = {}
    for i, (layout, _) in enumerate(announced):
        places.setdefault((layout.mesh, layout.sharding), []).append(i)
    return places


def split(bucket: list[Task]) -> Iterator[list[Task]]:
    """A bucket of the plan, which bounds messages, so that the elements in lock step are bounded too.

    What sends no matrices (experts on their ranks, one device, Gram form) leaves a large bucket and follows it.
    """
    if sum(task.share for task in bucket) <= ELEMENTS:
        yield bucket
        return
    moving = [task for task in bucket if task.moves]
    if moving:
        yield moving
    part: list[Task] = []
    for task in bucket:
        if task.moves:
            continue
        if part and sum(each.share for each in part) + task.share > ELEMENTS:
            yield part
            part = []
        part.append(task)
    if part:
        yield part


def planned(
    announced: Sequence[tuple[Layout, Wanted]], mesh: Any, sharding: tuple[int, ...], planner: Planner, counter: Any
) -> list[Task]:
    """The tasks of the parameters of one mesh."""
    team = ALONE if mesh is None else team_of(mesh, sharding)
    replicas = ALONE if mesh is None else team_of(mesh, replica_axes(mesh, sharding))
    found = plan_here(announced, mesh, sharding, planner)
    if mesh is not None:
        works = [(work.key(), *wire) for _, (work, wire, _) in announced]
        compare(found, works, [layout for layout, _ in announced], mesh, counter)
    return [
        Task(layout, work, *formats_of(layout, wire), holdings(layout), team, replicas, found, i)
        for i, (layout, (work, wire, _)) in enumerate(announced)
    ]


def plan_here(
    announced: Sequence[tuple[Layout, Wanted]], mesh: Any, sharding: tuple[int, ...], planner: Planner
) -> Plan:
    """The plan for the parameters of one mesh, from global facts."""
    members = [member_of(layout, work, *formats_of(layout, wire)) for layout, (work, wire, _) in announced]
    modes = [mode_asked(work, member, mode) for member, (_, (work, _, mode)) in zip(members, announced)]
    over = () if mesh is None else (sharding, replica_axes(mesh, sharding))
    shards, replicas = (prod(mesh.size(axis) for axis in axes) for axes in over) if over else (1, 1)
    return planner(members, shards, replicas, modes=modes)


def compare(found: Plan, works: Sequence[Any], layouts: Sequence[Layout], mesh: Any, counter: Any) -> None:
    """ValueError on every rank of the mesh where some made another plan: their messages would not fit.

    works: of every member the work's key and the formats, there and back.
    """
    digest = digest_of(found.digest(), works)
    ((low, high),) = extremes([int(digest, 16)], mesh, counter)
    if high == low:
        return
    raise ValueError(
        f"ranks of {mesh} made different plans for their matrices, {low:014x} and {high:014x} (this rank: {digest}): "
        f"{first_difference(found, works, layouts, mesh, counter)}. Give every rank the same parameters with "
        f"gradients, in the same order, and the same options\n{found.describe()}"
    )


def first_difference(found: Plan, works: Sequence[Any], layouts: Sequence[Layout], mesh: Any, counter: Any) -> str:
    """In words: the first parameter in which ranks differ. Every rank of the mesh asks, once a step cannot be taken."""
    ((fewest, most),) = extremes([len(works)], mesh, counter)
    facts = list(zip(found.members, found.modes, works))[:fewest]
    pairs = extremes([int(digest_of(fact), 16) for fact in facts], mesh, counter)
    first = next((i for i, (low, high) in enumerate(pairs) if low != high), fewest)
    if first < fewest:
        work, there, back = works[first]
        way = f"mode {found.modes[first]}, {work}, wire {there}+{back}"
        return f"they differ first in number {first}, here {describe(layouts[first])}, {way}"
    if fewest < most:
        more = first < len(layouts)
        here = f"number {first} is {describe(layouts[first])}" if more else f"{describe(layouts[-1])} is the last"
        return f"some have {fewest} matrices with gradients, some {most}; here {here}"
    return "of the same parameters, by planners with other options"


def digest_of(*facts: Any) -> str:
    """56 bits, which int64 holds with either sign."""
    return blake2b(repr(facts).encode(), digest_size=7).hexdigest()


def extremes(mine: Sequence[int], mesh: Any, counter: Any) -> list[tuple[int, int]]:
    """(least, greatest) over the ranks of the mesh, of every number; counter: gets the `collectives`."""
    both = torch.tensor([[x, -x] for x in mine], dtype=torch.int64, device=mesh.device_type)
    for axis in range(mesh.ndim):
        if mesh.size(axis) > 1:
            dist.all_reduce(both, op=dist.ReduceOp.MAX, group=mesh.get_group(axis))
            counter.collectives += 1
    return [(-low, high) for high, low in both.tolist()]
