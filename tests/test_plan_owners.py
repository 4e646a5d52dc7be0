"""Owners of units: against every assignment of a few, and by hand what each try is for."""

from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardopt.dtensor.owners import Unit, assign, longest, multifit, shortest

MESHES = ((1, 1), (2, 1), (3, 1), (1, 2), (2, 2), (1, 3))  # shards, replicas


def units_of(*sizes):
    """One unit each of these sizes; (size, holder) where a shard holds it."""
    pairs = [size if isinstance(size, tuple) else (size, None) for size in sizes]
    return [Unit(size, 0, ((i, 0),), holder) for i, (size, holder) in enumerate(pairs)]


def assigned(units, shards, replicas=1):
    owners = assign(units, shards, replicas, shortest(units, shards, replicas))
    assert len(owners) == len(units)
    for unit, owner in zip(units, owners):
        assert 0 <= owner < shards * replicas
        assert unit.holder is None or owner % shards == unit.holder
    return owners


def loads(units, shards, replicas=1):
    """FLOPs of every position."""
    found = [0] * (shards * replicas)
    for unit, owner in zip(units, assigned(units, shards, replicas)):
        found[owner] += unit.flops
    assert max(found) == longest(units, assigned(units, shards, replicas))
    return found


def shortest_of_all(units, shards, replicas):
    """The shortest longest share of all assignments, one by one."""
    positions = range(shards * replicas)
    places = [positions if unit.holder is None else positions[unit.holder :: shards] for unit in units]
    return min(longest(units, owners) for owners in product(*places))


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    st.lists(st.tuples(st.integers(0, 20), st.sampled_from([None, None, 0, 1])), max_size=6), st.sampled_from(MESHES)
)
def test_shares_are_near_the_shortest_of_all_assignments(sizes, mesh):
    """Of a few units, whatever is held: a bound that no assignment is below, and shares at most a quarter above."""
    shards, replicas = mesh
    units = units_of(*((size, holder and holder % shards) for size, holder in sizes))
    best = shortest_of_all(units, shards, replicas)
    assert shortest(units, shards, replicas) <= best
    assert best <= max(loads(units, shards, replicas)) <= 1.25 * best


@pytest.mark.parametrize(
    ("sizes", "shards", "replicas", "best"),
    [
        ((3, (1, 0), (1, 0), (1, 0), (1, 1), (1, 1)), 2, 2, 3),
        ((6, 5, 5, 3, (3, 0)), 2, 1, 11),
        ((6, (5, 0), 4, (4, 0), 3, (2, 0)), 1, 2, 12),
        ((3, 3, 2, (3, 1), 2, (1, 0)), 2, 1, 7),
        ((8, 6, 1, (1, 1), (1, 0), 8, 7, (5, 1)), 2, 1, 19),
        ((7, 5, 4, (1, 1)), 2, 1, 9),
        ((3, 3, 2, 2, (2, 0)), 1, 2, 6),
        (((8, 1), (8, 2), 7, 6, 6, 5, (4, 0), 4), 3, 1, 17),
        ((3, 3, 2, 2, 2), 2, 1, 6),
        (((6, 0), 3, 3, 2, 2, 2), 3, 1, 6),
    ],
)
def test_every_try_is_the_best_for_some(sizes, shards, replicas, best):
    """Kills, case by case: held units always first; never first; after free ones as long; a second try that is not
    made; the last try in place of the best; what is held packed last, or packed first only; places in their order."""
    units = units_of(*sizes)
    assert max(loads(units, shards, replicas)) == best == shortest_of_all(units, shards, replicas)


def test_of_two_tries_the_shorter_share_is_taken():
    """Where packing finds no shorter one. Kills: the last try taken, which ends at 17."""
    assert sorted(loads(units_of(8, 7, 6, (5, 0), 4), 2)) == [14, 16]


def test_held_units_come_first():
    """Kills: longest first alone, which is even enough with 21 beside 20 and puts one unit beside another."""
    for size in (3, 20):
        assert assigned(units_of(size, (1, 0)), 2) == [1, 0]


def test_units_without_elements_need_no_room():
    """Kills: a division by their size; units that a full rank cannot get."""
    units = units_of((6, 0), 3, 3, 2, 2, 2)
    owners = assigned([*units, *[Unit(0, 0, ((9, 0),))] * 9], 3)
    assert owners[:6] == assigned(units, 3) and set(owners[6:]) <= {0, 1, 2}


def test_packing_bisects_to_a_thousandth():
    """And takes only what holds every unit. Kills: one unit left over; a search that ends early or begins too low."""
    units = units_of(3000, 3000, 2000, 2000, 2000)
    for low in (5000, 5999, 6000):
        for high in (6006, 6500, 7000, 13000):
            owners = multifit(units, 2, 1, low, high)
            assert len(owners) == 5 and longest(units, owners) == 6000
    assert multifit(units, 2, 1, 6000, 6008) and not multifit(units, 2, 1, 5994, 6000)
    assert not multifit(units, 2, 1, 6000, 6004)
    units = units_of(3, 3, 2, 2, 2)
    assert multifit(units, 2, 1, 6, 7) and not multifit(units, 2, 1, 6, 6)


def test_shortest_counts_matrices_that_must_meet():
    """Of 5, 5, 5 and 2 on two ranks two of the largest three meet; a holder's matrices have its replicas only.

    Kills: holders forgotten; those of one holder counted for all ranks, or twice; units counted for matrices.
    """
    units = units_of(5, 5, 5, 2)
    assert [shortest(units, shards) for shards in (1, 2, 4)] == [17, 10, 5]
    assert shortest(units, 1, 2) == shortest(units_of((5, 0), (5, 0), (5, 0), (2, 0)), 4, 2) == 10
    assert shortest(units_of((1, 0), (1, 1), (1, 1), (1, 1)), 4) == 3
    assert shortest([Unit(12, 0, tuple((0, m) for m in range(4)))], 2) == 6
    assert shortest(units_of((3, 0), 3, 3), 2) == shortest(units_of(4, 3, 2, 2), 2) == 6
    assert shortest(units_of(5, 5, 5, 5, 5), 2) == 15
    assert shortest([], 3) == 0
