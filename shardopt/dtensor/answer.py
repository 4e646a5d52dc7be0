"""Answers what rules ask: float64 local sums, then one flat all-reduce a mesh axis and round for all parameters.

A parameter sharded over two mesh axes is reduced over the first, then over the second: every message is as long
as what needs that axis, no group has to be made, and all ranks hold the same bits.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.asks import EVERYWHERE, Ask, Max, Mean, Sum, Total
from shardopt.dtensor.layout import Layout


class Answers:
    """Starts and finishes rounds, and counts: rounds with communication, collectives, bytes a rank sent in."""

    def __init__(self) -> None:
        self.rounds = self.collectives = self.bytes = 0

    def start(self, asked: Sequence[tuple[Layout, Ask]]) -> "Round":
        """Begin to answer; every rank must ask the same in the same order. `finish()` gives the answers, in order."""
        return Round(self, asked)


class Round:
    """One round of asks on the way."""

    def __init__(self, counter: Answers, asked: Sequence[tuple[Layout, Ask]]) -> None:
        self.counter, self.asked = counter, asked
        self.values = [local_value(ask) for _, ask in asked]
        self.steps = plan(asked)
        self.pending: Any = None
        if self.steps:
            counter.rounds += 1
            self.issue()

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
        return False

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
        return [answer(layout, ask, value) for (layout, ask), value in zip(self.asked, self.values)]


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
            kind = "max" if isinstance(ask, Max) else "sum"
            messages.setdefault((layout.mesh, axis, kind), []).append(i)
    ops = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX}
    order = sorted(messages, key=lambda m: (meshes.index(m[0]), m[1], m[2]))
    return [(mesh, axis, ops[kind], messages[mesh, axis, kind]) for mesh, axis, kind in order]


def axes_of(layout: Layout, ask: Ask) -> tuple[int, ...]:
    """The mesh axes over which this ask is reduced."""
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


def local_value(ask: Ask) -> Tensor:
    """The local share: sums in float64, maxima and totals as they come."""
    if isinstance(ask, Max):
        return ordered(ask.x)
    if isinstance(ask, Total):
        return ask.x
    if ask.dim is None:
        return ask.x.sum(dtype=torch.float64)
    if ask.dim == ():
        return ask.x
    return ask.x.sum(dim=ask.dim, dtype=torch.float64)


def answer(layout: Layout, ask: Ask, value: Tensor) -> Tensor:
    """What the asker gets: 0-d stays float64, lines become float32; a mean is over the GLOBAL count."""
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
