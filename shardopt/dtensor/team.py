"""Teams: the ranks that differ only along some axes of a mesh, as one process group."""

from dataclasses import dataclass
from itertools import product
from typing import Any
from weakref import WeakKeyDictionary

import torch.distributed as dist

from shardopt.dtensor.layout import coordinates


@dataclass(frozen=True)
class Team:
    """Ranks along some mesh axes. Positions count in mesh order, the last axis fastest.

    group: None for a team of one. position: this rank's. order: the positions, in the order of the group's ranks.
    """

    group: Any
    size: int
    position: int
    order: tuple[int, ...]


ALONE = Team(None, 1, 0, (0,))
TEAMS: WeakKeyDictionary[Any, dict[Any, Team]] = WeakKeyDictionary()  # of a default process group: (mesh, axes) -> team


def team_of(mesh: Any, axes: tuple[int, ...]) -> Team:
    """The team of this rank along the axes (ascending); made at first use, which all its ranks must share."""
    axes = tuple(axis for axis in axes if mesh.size(axis) > 1)
    if not axes:
        return ALONE
    known = TEAMS.setdefault(dist.group.WORLD, {})
    if (mesh, axes) not in known:
        known[mesh, axes] = made(mesh, axes)
    return known[mesh, axes]


def made(mesh: Any, axes: tuple[int, ...]) -> Team:
    here = coordinates(mesh)
    places = product(*(range(n) if axis in axes else (here[axis],) for axis, n in enumerate(mesh.mesh.shape)))
    ranks = [int(mesh.mesh[place]) for place in places]
    # a flattened mesh would do, but needs names
    several = len(axes) > 1
    group = dist.new_group(ranks, use_local_synchronization=True) if several else mesh.get_group(axes[0])
    order = tuple(ranks.index(rank) for rank in dist.get_process_group_ranks(group))
    return Team(group, len(ranks), ranks.index(dist.get_rank()), order)


def replica_axes(mesh: Any, sharding: tuple[int, ...]) -> tuple[int, ...]:
    """The axes (of size > 1) along which a parameter sharded over `sharding` is repeated."""
    return tuple(axis for axis in range(mesh.ndim) if axis not in sharding and mesh.size(axis) > 1)
