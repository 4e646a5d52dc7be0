"""Answers what rules ask: float64 local sums, then one flat all-reduce a mesh axis and round for all parameters.

A parameter sharded over two mesh axes is reduced over the first, then over the second: every message is as long
as what needs that axis, no group has to be made, and all ranks hold the same bits. Whole matrices: `whole.py`.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.asks import EVERYWHERE, Ask, Max, Mean, Sum, Total, Whole
from shardopt.dtensor.gram import Gram, Local
from shardopt.dtensor.layout import Layout
from shardopt.dtensor.plan import plan as plan_matrices
from shardopt.dtensor.schedule import Planner, Schedule, Wanted, schedule
from shardopt.dtensor.whole import Passage

KEPT = 16  # schedules: as many sets of parameters can take turns in having gradients


class Answers:
    """Starts and finishes rounds, and counts: rounds with communication, collectives, bytes a rank sent in.

    sent: those of the bytes that went to other ranks as pieces of matrices; worked: matrices this rank worked on
    whole. planner: `shardopt.dtensor.plan.plan`, or with other options.
    """

    def __init__(self, planner: Planner = plan_matrices) -> None:
        self.rounds = self.collectives = self.bytes = self.sent = self.worked = 0
        self.planner = planner
        self.schedules: dict[Any, Schedule] = {}
        self.scheduled = Schedule((), {})

    def announce(self, wanted: Sequence[tuple[Layout, Wanted]]) -> tuple[tuple[int, ...], ...]:
        """Plan for all that will ask `Whole` in this step; returns the buckets in which they must ask, as positions.

        What was planned once is not planned, or compared between ranks, again.
        """
        key = tuple((id(layout), work, wire, mode) for layout, (work, wire, mode) in wanted)
        if key not in self.schedules:
            if len(self.schedules) == KEPT:
                del self.schedules[next(iter(self.schedules))]
            self.schedules[key] = schedule(wanted, self.planner, self)
        self.scheduled = self.schedules[key]
        return self.scheduled.buckets

    def start(self, asked: Sequence[tuple[Layout, Ask]]) -> "Round":
        """Begin to answer; every rank must ask the same in the same order. `finish()` gives the answers, in order."""
        return Round(self, asked)


class Round:
    """One round of asks on the way."""

    def __init__(self, counter: Answers, asked: Sequence[tuple[Layout, Ask]]) -> None:
        self.counter, self.count = counter, len(asked)
        before = counter.collectives
        settled = [(layout, settle(counter, layout, ask)) for layout, ask in asked]
        self.whole = [i for i, (_, ask) in enumerate(settled) if isinstance(ask, Whole)]
        self.rest = [i for i, (_, ask) in enumerate(settled) if not isinstance(ask, Whole)]
        self.asked = [settled[i] for i in self.rest]
        self.values = [local_value(ask) for _, ask in self.asked]
        self.steps = plan(self.asked)
        self.pending: Any = None
        if self.steps:
            self.issue()
        self.passage: Passage | None = None
        if self.whole:
            route = counter.scheduled.route([asked[i][0] for i in self.whole])
            self.passage = Passage(route, [asked[i][1].x for i in self.whole], counter)
        counter.rounds += counter.collectives > before

    def issue(self) -> None:
        """Send the next message: the values that need this mesh axis, end to end."""
        mesh, axis, op, members = self.steps[0]
        # the group speaks on the mesh's device, also for parameters that are offloaded from it
        flat = torch.cat([self.values[i].reshape(-1).to(mesh.device_type) for i in members])
        work = dist.all_reduce(flat, op=op, group=mesh.get_group(axis), async_op=True)
        self.counter.collectives += 1
        self.counter.bytes += flat.numel() * flat.element_size()
        self.pending = (work, flat, members)

    def advance(self) -> bool:
        """Work that must be done before the last message can travel; whether another message is now on its way."""
        return self.passage is not None and self.passage.advance()

    def finish(self) -> list[Tensor]:
        while self.steps:
            work, flat, members = self.pending
            work.wait()
            self.pending = None
            pieces = flat.split([self.values[i].numel() for i in members])
            for i, piece in zip(members, pieces):
                self.values[i] = piece.view(self.values[i].shape).to(self.values[i].device)
            self.steps.pop(0)
            if self.steps:
                self.issue()
        while self.advance():
            pass
        found = {i: answer(*asked, value) for i, asked, value in zip(self.rest, self.asked, self.values)}
        if self.passage is not None:
            found.update(zip(self.whole, self.passage.results))
        return [found[i] for i in range(self.count)]


def settle(counter: Answers, layout: Layout, ask: Any) -> Any:
    """The ask itself; for a `Whole` that moves no matrices, what is asked instead, by its mode and the plan's."""
    if not isinstance(ask, Whole):
        return ask
    assert id(layout) in counter.scheduled.tasks, "a rule that asks Whole announces it: Rule.whole"
    task = counter.scheduled.tasks[id(layout)]
    if "local" in (ask.mode, task.mode):
        return Local(ask.x, ask.work)
    return Gram(ask.x, ask.work, task.cut) if task.mode == "gram" else ask


def plan(asked: Sequence[tuple[Layout, Ask]]) -> list[tuple[Any, int, Any, list[int]]]:
    """(mesh, axis, op, members) of every message of a round: meshes as they first appear, axes ascending."""
    messages: dict[tuple[Any, int, str], list[int]] = {}
    meshes: list[Any] = []
    for i, (layout, ask) in enumerate(asked):
        if layout.mesh is None:
            continue
        if layout.mesh not in meshes:
            meshes.append(layout.mesh)
        for axis in axes_of(layout, ask):
            kind = "max" if isinstance(ask, Max) else "gram" if isinstance(ask, Gram) else "sum"
            messages.setdefault((layout.mesh, axis, kind), []).append(i)
    ops = {"sum": dist.ReduceOp.SUM, "gram": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    order = sorted(messages, key=lambda m: (meshes.index(m[0]), m[1], m[2]))
    return [(mesh, axis, ops[kind], messages[mesh, axis, kind]) for mesh, axis, kind in order]


def axes_of(layout: Layout, ask: Ask) -> tuple[int, ...]:
    """The mesh axes over which this ask is reduced."""
    if isinstance(ask, Local):
        return ()
    if isinstance(ask, Total):
        return layout.sharding
    if ask.over == EVERYWHERE:
        return tuple(axis for axis in range(layout.mesh.ndim) if layout.mesh.size(axis) > 1)
    return tuple(sorted({axis for dim in dims_over(layout, ask) for axis in layout.axes[dim]}))


def dims_over(layout: Layout, ask: Sum | Mean | Max) -> tuple[int, ...]:
    """The view's dims along which this ask is reduced, as non-negative numbers."""
    over: Any = ask.over
    if over is None and not isinstance(ask, Max):
        over = ask.dim
    ndim = len(layout.geo.view)
    if over is None:
        return tuple(range(ndim))
    dims = (over,) if isinstance(over, int) else over
    return tuple(dim % ndim for dim in dims)


def local_value(ask: Any) -> Tensor:
    """The local share: sums in float64, products in float32, the rest as it comes."""
    if isinstance(ask, Gram):
        return ask.products()
    if isinstance(ask, Max):
        return ordered(ask.x)
    if isinstance(ask, Total | Local):
        return ask.x
    if ask.dim is None:
        return ask.x.sum(dtype=torch.float64)
    if ask.dim == ():
        return ask.x
    return ask.x.sum(dim=ask.dim, dtype=torch.float64)


def answer(layout: Layout, ask: Any, value: Tensor) -> Tensor:
    """What the asker gets: 0-d stays float64, lines become float32; a mean is over the GLOBAL count."""
    if isinstance(ask, Gram):
        return ask.answer(value)
    if isinstance(ask, Local):
        return ask.answer()
    if isinstance(ask, Mean):
        value = value / max(1, prod(layout.geo.view[dim] for dim in dims_over(layout, ask)))
    if isinstance(ask, Max):
        return unordered(value)
    return value if value.ndim == 0 else value.float()


def ordered(x: Tensor) -> Tensor:
    """float32 as int32 that compare alike, NaN above all: the maxima of gloo and nccl may lose a NaN."""
    bits = torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def unordered(bits: Tensor) -> Tensor:
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
