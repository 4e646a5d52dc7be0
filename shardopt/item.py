"""One parameter in one step, and how a large one is cut into pieces of rows that fit the cache."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from shardopt.codecs import Codec
from shardopt.codecs.geometry import Geometry, taken
from shardopt.dtensor.gradient import local_gradient
from shardopt.dtensor.layout import Layout, local_of
from shardopt.recipe import Recipe
from shardopt.state import KEY, STEP, part_specs

# elements of a piece: temporaries stay in the cache of a CPU core; on an accelerator they are only bounded
CPU_PIECE, PIECE = 1 << 16, 1 << 24


@dataclass
class Item:
    """One parameter in one step. grad, p: local tensors of the parameter's shape; state: name -> local tensor."""

    p: Tensor
    grad: Tensor
    layout: Any
    recipe: Recipe
    codecs: dict[str, Codec]
    state: dict[str, Tensor]
    group: dict[str, Any]


def item_of(
    p: Tensor,
    layout: Layout,
    recipe: Recipe,
    codecs: dict[str, Codec],
    stored: Mapping[str, Tensor] | None,
    group: dict[str, Any],
) -> Item:
    """The item of a parameter with a gradient; ValueError where its gradient or its state does not fit."""
    grad = local_gradient(p, layout)
    if not stored:
        raise ValueError(
            f"{layout.name} has a gradient but no state: other parameters are still on the meta device. Call to_empty "
            "on the whole model before the first step"
        )
    parts = {name: local_of(part) for name, part in stored.items()}
    return Item(local_of(p), grad, layout, recipe, codecs, parts, group)


LARGEST = 2.0**64  # of a gradient: from here on its square, and with it a second moment in codes, is not finite


class Policy(NamedTuple):
    """What a step does with gradients. nonfinite: see ShardedOptimizer; grad_scale, found_inf: GradScaler's."""

    nonfinite: str = "propagate"
    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


@dataclass(frozen=True)
class Rows:
    """Some rows of a local view; stands in for the layout of a piece."""

    geo: Geometry

    @property
    def local_shape(self) -> tuple[int, ...]:
        return self.geo.local

    def view(self, local: Tensor) -> Tensor:
        return local.reshape(self.geo.local)


def viewed(item: Item, name: str) -> Tensor:
    """A stored part, the local tensor; codes of the parameter's own shape in the view's."""
    local = item.state[name]
    return item.layout.view(local) if tuple(local.shape) == item.layout.local_shape else local


def asks(item: Item) -> bool:
    """Whether a step of this parameter needs more than its own rows."""
    recipe = item.recipe
    return (
        recipe.rule.asks
        or any(addon.asks for addon in recipe.addons)
        or any(codec.asks(item.layout.geo) for codec in item.codecs.values())
    )


def pieces(item: Item) -> list[Item]:
    """The item itself, or, where it is large and every row can be stepped alone, rows of it one after another.

    The bits are the same: blocks restart at every row, and noise is keyed by global rows.
    """
    geo = item.layout.geo
    rows, size = geo.local[0], prod(geo.local)
    limit = CPU_PIECE if item.p.device.type == "cpu" else PIECE
    if size <= limit or rows < 2 or not item.p.is_contiguous() or asks(item):
        return [item]
    p, grad = item.layout.view(item.p), item.layout.view(item.grad)
    parts = {name: viewed(item, name) for name in part_specs(item.codecs, item.layout)}
    shared = {name: item.state[name] for name in (STEP, KEY) if name in item.state}
    step = max(1, limit * rows // size)
    cut = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        runs = (taken(geo.runs[0], first, last), *geo.runs[1:])
        state = {**shared, **{name: part[first:last] for name, part in parts.items()}}
        layout = Rows(Geometry(geo.view, runs, geo.cuts))
        cut.append(Item(p[first:last], grad[first:last], layout, item.recipe, item.codecs, state, item.group))
    return cut
