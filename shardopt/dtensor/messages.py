"""Which messages a round of asks takes: of which mesh axis, reduced how, and of whom; and how maxima travel."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.asks import EVERYWHERE, Ask, Max, Mean, Sum, Total
from shardopt.dtensor.gram import Gram, Local
from shardopt.dtensor.layout import Layout


def messages_of(asked: Sequence[tuple[Layout, Ask]]) -> list[tuple[Any, int, Any, list[int]]]:
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


def ordered(x: Tensor) -> Tensor:
    """float32 as int32 that compare alike, NaN above all: the maxima of gloo and nccl may lose a NaN."""
    bits = torch.where(x.isnan(), torch.nan, x.float()).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def unordered(bits: Tensor) -> Tensor:
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).view(torch.float32)
