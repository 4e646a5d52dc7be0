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

from shardopt.asks import Ask, Max, Mean, Total, Whole
from shardopt.dtensor.gram import Gram, Local
from shardopt.dtensor.layout import Layout
from shardopt.dtensor.messages import dims_over, messages_of, ordered, unordered
from shardopt.dtensor.plan import Plan
from shardopt.dtensor.plan import plan as plan_matrices
from shardopt.dtensor.reserve import Reserve
from shardopt.dtensor.row_blocks import block_sums, told_to_rows
from shardopt.dtensor.schedule import Planner, Schedule, Wanted, foreseen, schedule
from shardopt.dtensor.standing import Standing
from shardopt.dtensor.whole import Passage
from shardopt.telling import tell

KEPT = 1 << 16  # parameters in all schedules that are kept, 1.4 kB each: sets of them take turns in having gradients


class Answers:
    """Starts and finishes rounds, and counts: rounds with communication, collectives, bytes a rank sent in.

    sent: those of the bytes that went to other ranks as pieces of matrices; worked: matrices this rank worked on
    whole. planner: `shardopt.dtensor.plan.plan`, or with other options. reserve: memory of messages. coder: None, or
    `shardopt.kernels.wire.Coder`, which encodes and decodes them natively.
    """

    def __init__(self, planner: Planner = plan_matrices, coder: Any = None) -> None:
        self.rounds = self.collectives = self.bytes = self.sent = self.worked = 0
        self.planner, self.coder = planner, coder
        self.reserve = Reserve()
        self.schedules: dict[Any, Schedule] = {}
        self.scheduled = Schedule((), {})
        self.forgets = False  # whether a schedule was given up, which is told once

    def announce(self, wanted: Sequence[tuple[Layout, Wanted]]) -> tuple[tuple[int, ...], ...]:
        """Plan for all that will ask `Whole` in this step; returns the buckets in which they must ask, as positions.

        What was planned is not planned, or compared between ranks, again, unless it was given up as the one that had
        not been used for longest.
        """
        key = tuple((id(layout), work, wire, mode) for layout, (work, wire, mode) in wanted)
        known = self.schedules.pop(key, None)
        self.schedules[key] = self.scheduled = known or schedule(wanted, self.planner, self)
        while known is None and len(self.schedules) > 1 and sum(len(s.tasks) for s in self.schedules.values()) > KEPT:
            self.forget()
        return self.scheduled.buckets

    def forget(self) -> None:
        """Give up the schedule that has not been used for longest."""
        if not self.forgets and not (dist.is_initialized() and dist.get_rank()):
            tell(
                f"{len(self.schedules)} different sets of matrices have had gradients so far; plans of no more are "
                "kept, so that a set which returns may be planned, and compared between ranks, once more. Where few "
                "sets would do: keep zeros as the gradients of what was not used (zero_grad(set_to_none=False))"
            )
        self.forgets = True
        del self.schedules[next(iter(self.schedules))]

    def foreseen(self, wanted: Sequence[tuple[Layout, Wanted]]) -> list[Plan]:
        """What `announce` will plan, for people: nothing is compared between ranks or kept."""
        return foreseen(wanted, self.planner)

    def start(self, asked: Sequence[tuple[Layout, Ask]]) -> "Round":
        """Begin to answer; every rank must ask the same in the same order. `finish()` gives the answers, in order."""
        return Round(self, asked)

    def standing(self, asked: Sequence[tuple[Layout, Ask]], flats: Sequence[Tensor]) -> Standing:
        """A round that will be asked again and again: see `Standing`."""
        return Standing(self, asked, flats)

    def send(self, mesh: Any, axis: int, op: Any, flat: Tensor) -> Any:
        """All-reduce over one mesh axis, counted; what one waits on."""
        self.collectives += 1
        self.bytes += flat.numel() * flat.element_size()
        return dist.all_reduce(flat, op=op, group=mesh.get_group(axis), async_op=True)


class Round:
    """One round of asks on the way."""

    def __init__(self, counter: Answers, asked: Sequence[tuple[Layout, Ask]]) -> None:
        self.counter, self.count = counter, len(asked)
        before = counter.collectives
        settled = [(layout, settle(counter, layout, ask)) for layout, ask in asked]
        self.whole = [i for i, (_, ask) in enumerate(settled) if isinstance(ask, Whole)]
        self.rest = [i for i, (_, ask) in enumerate(settled) if not isinstance(ask, Whole)]
        self.asked = [settled[i] for i in self.rest]
        self.values = [local_value(*asked) for asked in self.asked]
        self.steps = messages_of(self.asked)
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
        self.pending = (self.counter.send(mesh, axis, op, flat), flat, members)

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


def local_value(layout: Layout, ask: Any) -> Tensor:
    """The local share: sums in float64, products in float32, the rest as it comes."""
    if isinstance(ask, Gram):
        return ask.products()
    if isinstance(ask, Max):
        return ordered(ask.x)
    if isinstance(ask, Total | Local):
        return ask.x
    if isinstance(ask, Mean) and ask.blocks:
        return block_sums(ask.x.sum(dim=-1, dtype=torch.float64), layout.geo.runs[-2], ask.blocks)
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
    if isinstance(ask, Mean) and ask.blocks:
        value = told_to_rows(value, layout.geo.view[-1], layout.geo.runs[-2], ask.blocks)
    elif isinstance(ask, Mean):
        value = value / max(1, prod(layout.geo.view[dim] for dim in dims_over(layout, ask)))
    if isinstance(ask, Max):
        return unordered(value)
    return value if value.ndim == 0 else value.float()
