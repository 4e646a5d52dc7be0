"""The one reader of placements: what a parameter's DTensor spec says about its view, its cut and its groups."""

from dataclasses import dataclass, field
from functools import cached_property
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

from shardopt.codecs.base import Part
from shardopt.codecs.geometry import Geometry, Runs, is_stack, view_shape
from shardopt.dtensor.cut import Cut, boundaries, pieces_of


@dataclass(frozen=True)
class Layout:
    """Where one parameter lies. Made by `layout_of`.

    shape: global. mesh, placements: None and () for a plain tensor. geo: the view and what of it is local.
    axes: for every dim of the view, the mesh axes (of size > 1) that shard it. local_shape: of the local tensor.
    name: what errors call the parameter; layouts of other names are equal.
    """

    shape: tuple[int, ...]
    mesh: Any
    placements: tuple[Any, ...]
    geo: Geometry
    axes: tuple[tuple[int, ...], ...]
    local_shape: tuple[int, ...]
    name: str = field(default="", compare=False)

    @property
    def numel(self) -> int:
        return prod(self.shape)

    @cached_property
    def sharding(self) -> tuple[int, ...]:
        """All mesh axes that shard this parameter, ascending."""
        return tuple(sorted({axis for axes in self.axes for axis in axes}))

    @cached_property
    def ranks(self) -> int:
        """Over how many ranks the elements are spread."""
        return prod(self.mesh.size(axis) for axis in self.sharding) if self.sharding else 1

    @cached_property
    def mesh_ranks(self) -> Tensor:
        """Global ranks of the mesh, int64; none for a plain tensor."""
        return torch.empty(0, dtype=torch.int64) if self.mesh is None else self.mesh.mesh.flatten()

    def view(self, local: Tensor) -> Tensor:
        """A local tensor of the parameter's shape, in the local view; a copy only where strides force one."""
        return local.reshape(self.geo.local)

    def part_placements(self, part: Part) -> tuple[Any, ...]:
        """Placements of a part: the parameter's own objects wherever the part has the sharded dim."""
        if part.dims is None:
            return self.placements
        return tuple(self.follow(part, placement) for placement in self.placements)

    def follow(self, part: Part, placement: Any) -> Any:
        if not is_sharding(placement):
            return placement
        assert part.dims is not None
        dim = view_dim(self.shape, placement.dim)
        for mine, (followed, unit) in enumerate(part.dims):
            if followed != dim:
                continue
            if unit > 1 and any(cut % unit for cut in self.geo.cuts[dim]):
                if part.reducible:
                    return Replicate()
                raise ValueError(
                    f"codec part {part.suffix!r} packs {unit} columns a byte, but {describe(self)} cuts dim {dim} of "
                    f"its view {self.geo.view} at {self.geo.cuts[dim]}: a byte would lie on two ranks. "
                    "Use int8, sqrt8, log8, bf16 or fp32 for this group, or shard another dim"
                )
            return placement if placement.dim == mine else moved(placement, mine)
        return Replicate()

    def new(self, part: Part, device: torch.device) -> Tensor:
        """A fresh part on `device`: a plain tensor, or a DTensor that mirrors the parameter's sharding."""
        shape = part.shape(self.shape, self.geo.view)
        if self.mesh is None:
            return filled(shape, part, device)
        placements = self.part_placements(part)
        local = local_shape(shape, self.mesh, placements)
        if part.dims is not None and placements != self.placements:
            self.check_part(part, local, placements)
        return wrap(filled(local, part, device), self.mesh, placements, shape)

    def check_part(self, part: Part, local: tuple[int, ...], placements: tuple[Any, ...]) -> None:
        """The codec computes its local sizes from the geometry; DTensor from the placements. They must agree."""
        assert part.dims is not None
        for mine, (dim, unit) in enumerate(part.dims):
            split = any(is_sharding(p) and p.dim == mine for p in placements)
            expected = -(-self.geo.local[dim] // unit) if split else -(-self.geo.view[dim] // unit)
            if local[mine] != expected:
                raise ValueError(
                    f"{describe(self)} cannot hold part {part.suffix!r}: {local[mine]} entries by its placements, "
                    f"{expected} by its blocks. Shard another dim, or use bf16 or fp32 state for this group"
                )


def layout_of(tensor: Tensor, name: str = "") -> Layout:
    """The layout of a parameter. ValueError for placements that no optimizer step is defined on."""
    shape = tuple(tensor.shape)
    if isinstance(tensor, DTensor):
        return mesh_layout(shape, tensor.device_mesh, tuple(tensor.placements), name)
    geo = Geometry.whole(shape)
    return Layout(shape, None, (), geo, ((),) * len(geo.view), shape, name)


def checked_layout(p: Tensor, name: str = "") -> Layout:
    """The layout of a parameter whose local tensor was compared with its spec: the spec alone is not to be trusted."""
    layout = layout_of(p, name)
    real = tuple(p._local_tensor.shape) if isinstance(p, DTensor) else layout.local_shape
    if real != layout.local_shape:
        raise ValueError(
            f"{describe(layout)} has a local tensor of {real} where its placements say {layout.local_shape}: "
            "checkpoints would lose elements. Make the sharded sizes divide evenly"
        )
    return layout


def mesh_layout(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...], name: str = "") -> Layout:
    what = f"{name or 'a parameter'} of shape {shape}"
    for placement in placements:
        if not (is_sharding(placement) or placement.is_replicate()):
            raise ValueError(
                f"{what} has placements {placements}; an optimizer can step on Shard and "
                "Replicate only. Redistribute it (a Partial value must be reduced first)"
            )
    where = dict(enumerate(coordinates(mesh)))
    view = view_shape(shape)
    runs: list[Runs] = []
    cuts: list[tuple[int, ...]] = []
    axes: list[tuple[int, ...]] = []
    for dim in range(len(view)):
        members = [d for d in range(len(shape)) if view_dim(shape, d) == dim]
        inner = prod(shape[members[0] + 1 : members[-1] + 1]) if members else 1
        for d in members[1:]:
            if any(is_sharding(p) and p.dim == d for p in placements):
                raise ValueError(
                    f"{what} is sharded on dim {d}, which its view {view} merges into dim "
                    f"{members[0]}. Shard dim 0 or {members[0]}"
                )
        cut = cuts_of(mesh, placements, members[0]) if members else ()
        length = shape[members[0]] if members else 1
        if any(length % c.split for c in cut):
            # FSDP2 over TP then makes local tensors that differ from the spec on SOME ranks: refused on all alike
            raise ValueError(
                f"{what} with placements {placements} has {length} entries in dim {members[0]}, "
                f"which is not a multiple of the {max(c.split for c in cut)} tensor-parallel ranks that also cut it: "
                "its local tensors would not be what the placements say. Pad it, or shard another dim"
            )
        runs.append(tuple((a * inner, b * inner) for a, b in pieces_of(length, cut, where)))
        cuts.append(tuple(b * inner for b in boundaries(length, cut)))
        axes.append(tuple(c.axis for c in cut if c.size > 1))
    local = local_shape(shape, mesh, placements)
    return Layout(shape, mesh, placements, Geometry(view, tuple(runs), tuple(cuts)), tuple(axes), local, name)


def is_sharding(placement: Any) -> bool:
    """Shard or _StridedShard, which is not a Shard in any version supported."""
    return hasattr(placement, "dim") and not placement.is_replicate() and not placement.is_partial()


def cuts_of(mesh: Any, placements: tuple[Any, ...], dim: int) -> tuple[Cut, ...]:
    """The mesh axes that shard tensor dim `dim`, in the order in which they cut."""
    return tuple(
        Cut(axis, mesh.size(axis), int(getattr(p, "split_factor", 1)))
        for axis, p in enumerate(placements)
        if is_sharding(p) and p.dim == dim
    )


def local_shape(shape: tuple[int, ...], mesh: Any, placements: tuple[Any, ...]) -> tuple[int, ...]:
    where = dict(enumerate(coordinates(mesh)))
    return tuple(
        sum(length for _, length in pieces_of(size, cuts_of(mesh, placements, dim), where))
        for dim, size in enumerate(shape)
    )


def coordinates(mesh: Any) -> tuple[int, ...]:
    here = mesh.get_coordinate()
    if here is None:
        raise ValueError(f"this rank is not part of {mesh}; build the optimizer only on ranks that hold its parameters")
    return tuple(here)


def view_dim(shape: tuple[int, ...], dim: int) -> int:
    """The dim of the view that holds this dim of the parameter."""
    if len(shape) <= 2 or is_stack(shape):
        return dim
    return min(dim, 1)


def moved(placement: Any, dim: int) -> Any:
    """The same kind of placement on another dim."""
    if hasattr(placement, "split_factor"):
        return type(placement)(dim, split_factor=placement.split_factor)
    return type(placement)(dim)


def filled(shape: tuple[int, ...], part: Part, device: torch.device) -> Tensor:
    if not part.fill:
        return torch.zeros(shape, dtype=part.dtype, device=device)
    return torch.full(shape, part.fill, dtype=part.dtype, device=device)


def wrap(local: Tensor, mesh: Any, placements: tuple[Any, ...], shape: tuple[int, ...]) -> DTensor:
    """A DTensor around a local tensor as it is; from_local would move the state of an offloaded parameter."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= size
    meta = TensorMeta(torch.Size(shape), tuple(reversed(strides)), local.dtype)
    return DTensor(local, DTensorSpec(mesh, placements, tensor_meta=meta), requires_grad=False)


def local_of(tensor: Tensor) -> Tensor:
    """The local tensor, without autograd; the tensor itself where it is plain."""
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    with torch.no_grad():
        return tensor.to_local()


def describe(layout: Layout) -> str:
    where = "a plain tensor" if layout.mesh is None else f"placements {layout.placements} on {layout.mesh}"
    return f"{layout.name or 'a parameter'} of shape {layout.shape} with {where}"
