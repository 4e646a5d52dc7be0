"""Teams of ranks along mesh axes: who is in them, at which position, in which order."""

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardopt.dtensor.team import ALONE, replica_axes, team_of
from tests.threaded import run_threaded

SIZES = (2, 1, 2, 3)


def teams(rank):
    """Of every set of axes: size, position, ranks by position; whether it is made once."""
    mesh = init_device_mesh("cpu", SIZES)
    found = {}
    for axes in ((), (1,), (0,), (2,), (3,), (0, 1), (2, 3), (0, 3), (0, 1, 2, 3)):
        team = team_of(mesh, axes)
        ranks = [rank] if team.group is None else dist.get_process_group_ranks(team.group)
        by_position = dict(zip(team.order, ranks, strict=True))
        known = team is team_of(mesh, axes)
        found[axes] = team.size, team.position, [by_position[i] for i in range(team.size)], known
    alone = team_of(mesh, (1,)) is team_of(mesh, ()) is ALONE
    one = team_of(mesh, (0, 1)) is team_of(mesh, (0,)) and team_of(mesh, (2,)).group is mesh.get_group(2)
    return found, alone and one, [replica_axes(mesh, axes) for axes in ((), (0,), (2, 3), (0, 2, 3))]


def test_teams_of_a_mesh():
    """Positions count the last axis fastest; axes of size 1 make no team. Kills: a group of one; ranks for positions;
    another axis' group; teams that are made anew, or groups that the mesh has."""
    for rank, (found, alone, repeated) in enumerate(run_threaded(12, teams)):
        assert alone and repeated == [(0, 2, 3), (2, 3), (0,), ()]
        here = rank // 6, 0, rank // 3 % 2, rank % 3
        for axes, (size, position, ranks, known) in found.items():
            there = [r for r in range(12) if alike(r, here, axes)]
            assert (size, ranks, ranks[position], known) == (len(there), there, rank, True)


def shuffled(rank):
    mesh = DeviceMesh("cpu", [[3, 0], [1, 2]])
    teams = [team_of(mesh, axes) for axes in ((1,), (0, 1))]
    return [
        (team.position, [dist.get_process_group_ranks(team.group)[team.order.index(i)] for i in range(team.size)])
        for team in teams
    ]


def test_teams_of_a_mesh_in_another_order():
    """Kills: positions taken for places in the group, whose ranks ascend."""
    for rank, ((position, ranks), (place, all_ranks)) in enumerate(run_threaded(4, shuffled)):
        assert ranks == ([3, 0] if rank in (0, 3) else [1, 2]) and ranks[position] == rank
        assert all_ranks == [3, 0, 1, 2] and all_ranks[place] == rank


def alike(rank, here, axes):
    """Whether the rank differs from the one at these coordinates along these axes alone."""
    place = rank // 6, 0, rank // 3 % 2, rank % 3
    return all(a == b or axis in axes for axis, (a, b) in enumerate(zip(place, here)))
