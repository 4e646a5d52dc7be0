"""What tests of `Whole` share: a work that shows every misplaced element, a rule that asks for it, cut parameters."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from shardopt import Recipe, ShardedOptimizer
from shardopt.asks import Asking, Slot, Sum, Whole, Wire
from shardopt.rules.base import Hyper, Rule
from tests.table import gradients, weights
from tests.test_mesh import distributed
from tests.virtual import Axis, Rank


@dataclass(frozen=True, kw_only=True)
class Mix:
    """A cheap work: what comes out of a place depends on every element of its matrix and on where each of them is.

    In float64, one matrix at a time, so that no batch changes a bit. Not finite makes all of a matrix NaN.
    """

    scale: float = 1.0

    def __call__(self, x: Tensor) -> Tensor:
        return torch.stack([self.mixed(matrix) for matrix in x.reshape(-1, *x.shape[-2:])]).view(x.shape)

    def mixed(self, x: Tensor) -> Tensor:
        y = x.double()
        down, right = (torch.linspace(0.5, 2, n, dtype=torch.float64) for n in x.shape)
        total = (y * down[:, None] * right).sum()
        mixed = y.cumsum(0) / (1 + y.square().sum().sqrt()) + 0.01 * total.tanh() * right
        return (mixed * self.scale + y.sum() * 0).float()

    def flops(self, rows: int, cols: int) -> float:
        return 4.0 * rows * cols * min(rows, cols)

    def key(self) -> str:
        return f"mix({self.scale})"


@dataclass(frozen=True, kw_only=True)
class Asker(Rule):
    """A momentum of which the whole matrix is worked on; vectors step on the momentum itself.

    beside: whether a norm is asked together with the matrix, and another one after it.
    """

    name: ClassVar[str] = "asker"
    asks: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("lr", "momentum")
    lr: Any = 0.1
    momentum: Any = 0.9
    there: str = "fp32"
    back: str = "fp32"
    mode: str = "full"
    work: Any = None
    beside: bool = False

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer"),)

    def whole(self, view: tuple[int, ...]) -> tuple[Any, Wire, str] | None:
        return (self.work or Mix(), Wire(self.there, self.back), self.mode) if len(view) > 1 else None

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        m = yield from s.momentum_buffer.recur(h.momentum, g)
        wanted = self.whole(h.shape)
        if wanted is None:
            return m, h.lr
        if not self.beside:
            return (yield Whole(m, *wanted)), h.lr
        o, squares = yield Whole(m, *wanted), Sum(m * m)
        other = yield Sum(o * o)
        return o * ((1 + squares) / (1 + other)).float(), h.lr


WIRES = (  # there, back
    ("fp32", "fp32"),
    ("bf16", "bf16"),
    ("int8(block=128)", "int8(block=128)"),
    ("int8(block=128)", "int4(block=64)"),
    ("int8(block=32)", "int4(block=8)"),
    ("dyn8(block=64)", "dyn4(block=32)"),
    ("fp8", "sqrt8"),
)


def groups(ps: Sequence[nn.Parameter], wires: Sequence[tuple[str, str]] = WIRES, **options: Any) -> ShardedOptimizer:
    """An optimizer with one group a wire; `ps` are its parameters, group by group."""
    each = len(ps) // len(wires)
    parts = [
        {"params": ps[i * each : (i + 1) * each], "recipe": Recipe(Asker(there=there, back=back, **options))}
        for i, (there, back) in enumerate(wires)
    ]
    return ShardedOptimizer(parts)


Place = tuple[DeviceMesh, tuple[Any, ...], Sequence[tuple[Axis, int]]]  # mesh, placements, axes in cutting order


def placed(shapes: Sequence[tuple[int, ...]], places: Sequence[Place | None]) -> tuple[list[nn.Parameter], list[Rank]]:
    """Parameters of these shapes, each cut as its place says, and the virtual ranks that know how."""
    ps, cuts = [], []
    for i, (shape, place) in enumerate(zip(shapes, places)):
        whole = weights(shape, seed=i)
        if place is None:
            ps.append(nn.Parameter(whole))
            cuts.append(Rank(shape, (), ()))
            continue
        mesh, placements, axes = place
        here = mesh.get_coordinate()
        cuts.append(Rank(shape, tuple(axis for axis, _ in axes), tuple(here[k] for _, k in axes)))
        ps.append(nn.Parameter(distributed(cuts[-1].cut(whole), shape, mesh, placements)))
    return ps, cuts


def train(
    optimizer: Any,
    ps: Sequence[nn.Parameter],
    cuts: Sequence[Rank] | None = None,
    steps: int = 2,
    change: Callable[[int, Tensor], Tensor] = lambda i, g: g,
) -> None:
    """Steps on the same gradients everywhere. change(i, g): what becomes of the i-th parameter's whole gradient."""
    every = [list(gradients(tuple(p.shape), steps, seed=20 + i)) for i, p in enumerate(ps)]
    for step in range(steps):
        for i, p in enumerate(ps):
            g = change(i, every[i][step])
            if cuts is not None and hasattr(p, "device_mesh"):
                g = distributed(cuts[i].cut(g), g.shape, p.device_mesh, p.placements)
            p.grad = g
        optimizer.step()


def local(p: Tensor) -> Tensor:
    return getattr(p, "_local_tensor", p).detach()


def elements(shapes: Sequence[tuple[int, ...]]) -> int:
    return sum(math.prod(shape) for shape in shapes)
