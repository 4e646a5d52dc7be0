"""Any mesh, any number of ranks: the unsharded step, over a pairwise cover of the whole table.

Kills: geo.whole on the local shard (blocks and noise from local places), noise keyed by the local row, a mean over
the local count, a sum over replicas, a scale of a block that straddles ranks left unreduced.
"""

import pytest
import torch

from tests.table import DTYPES, FLIPS, RULES, SHAPES, UNSHARDED, WEIGHT_DECAY, Case, cover, gradients, recipe, weights
from tests.virtual import Axis, Run, bits, view_of

STEPS = 5
MESHES = {
    "rows1": (Axis(1, 0),),
    "rows2": (Axis(2, 0),),
    "rows3": (Axis(3, 0),),
    "rows5": (Axis(5, 0),),
    "cols2": (Axis(2, 1),),
    "cols4": (Axis(4, 1),),
    "tp2 then fsdp3 on rows": (Axis(2, 0), Axis(3, 0)),
    "stripes": (Axis(2, 0, stripes=3),),
    "rows2 x cols2": (Axis(2, 0), Axis(2, 1)),
    "hsdp": (Axis(2, None), Axis(3, 0)),
    "replicas x cols3": (Axis(2, None), Axis(3, 1)),
}


def allowed(shape, mesh, run=None):
    """Whether this parameter can be cut so: it has the dims, no byte of two columns lies on two ranks."""
    if any(axis.dim is not None and axis.dim >= len(shape) for axis in mesh):
        return False
    probe = Run(recipe("sgd"), {}, torch.zeros(shape), mesh).ranks[0] if run is None else run
    return not any(cut % 2 for cut in probe.geo.cuts[-1])


def packs(case):
    return "4" in case.state and len(view_of(case.shape)) > 1


def meshes_for(case, number):
    """Two of the meshes that fit, in turn, so that all of them meet the whole cover."""
    fitting = [
        mesh
        for mesh in MESHES.values()
        if not any(axis.dim is not None and axis.dim >= len(case.shape) for axis in mesh)
        and (not packs(case) or allowed(case.shape, mesh))
    ]
    return [fitting[(2 * number + i) % len(fitting)] for i in range(2)] if fitting else []


def run_case(case, mesh=()):
    run = Run(case.recipe(), case.group(), weights(case.shape, DTYPES[case.dtype]), mesh)
    for g in gradients(case.shape, STEPS):
        run.step(g)
    return run


def compare(whole, cut, exact):
    """Bitwise where nothing was asked; else the bounds of contracts.md section 7. Returns (differing, all) values."""
    differing = total = 0
    pairs = [("p", whole.parameter(), cut.parameter())]
    mine, other = whole.parts(), cut.parts()
    assert list(mine) == list(other)
    pairs += [(name, mine[name], other[name]) for name in mine]
    for name, a, b in pairs:
        assert a.shape == b.shape and a.dtype == b.dtype, name
        different = int((bits(a) != bits(b)).sum())
        if exact or a.ndim == 0:
            assert different == 0, f"{name}: {different} of {a.numel()} values differ"
        elif a.dtype == torch.float32:
            distance, norm = (a - b).double().norm(), a.double().norm()
            assert distance <= UNSHARDED * norm, f"{name}: {distance / norm}"
        else:
            assert not different or ((bits(a).int() - bits(b).int()).abs() <= 1).all(), name
            differing, total = differing + different, total + a.numel()
    return differing, total


@pytest.mark.parametrize(
    "number, case", list(enumerate(cover())), ids=lambda x: x.name() if isinstance(x, Case) else ""
)
def test_cover(number, case):
    whole = run_case(case)
    assert torch.isfinite(whole.parameter()).all()
    for mesh in meshes_for(case, number):
        cut = run_case(case, mesh)
        assert cut.sums == whole.sums
        differing, total = compare(whole, cut, exact=not whole.sums)
        assert differing <= max(1, FLIPS * total)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_on_every_mesh(rule):
    """Kills: one reduction less in a rule (every rule meets every mesh, with a mesh-sensitive state)."""
    for shape in ((7, 15), (66, 9, 3, 3), (4, 32, 48)):
        case = Case(
            rule, "sqrt8+factored", "all" if "atan2" not in rule else "cautious", "nearest", "fp32", "fresh", shape
        )
        whole = run_case(case)
        for mesh in MESHES.values():
            compare(whole, run_case(case, mesh), exact=not whole.sums)


@pytest.mark.parametrize("shape", SHAPES)
def test_storage_is_a_function_of_the_global_shape(shape):
    """Names, dtypes and global shapes of what is stored are the same for every cut (P25)."""
    case = Case("adamw", "int8+log8", "none", "stochastic", "bf16", "fresh", shape)
    whole = run_case(case)
    for mesh in MESHES.values():
        if any(axis.dim is not None and axis.dim >= len(shape) for axis in mesh):
            continue
        parts = run_case(case, mesh).parts()
        assert {n: (x.shape, x.dtype) for n, x in parts.items()} == {
            n: (x.shape, x.dtype) for n, x in whole.parts().items()
        }


def test_empty_ranks_take_part():
    """(2, 16) on 5 ranks: three of them hold nothing, ask as often as the others, and change nothing."""
    case = Case("adafactor", "sqrt8+factored", "all", "stochastic", "bf16", "fresh", (2, 16))
    run = run_case(case, (Axis(5, 0),))
    assert [p.numel() for p in run.p] == [16, 16, 0, 0, 0]
    compare(run_case(case), run, exact=False)


def test_a_mutant_answer_shows():
    """The walk is not blind: an answerer that keeps its local share fails it.

    Kills: a test of meshes in which no reduction matters.
    """
    from tests import virtual

    case = Case("adafactor", "sqrt8+factored", "cautious", "nearest", "fp32", "fresh", (12, 512))
    whole, right = run_case(case), virtual.answers
    try:
        virtual.answers = lambda ranks, asks: [right([rank], [ask])[0] for rank, ask in zip(ranks, asks)]
        with pytest.raises(AssertionError):
            compare(whole, run_case(case, (Axis(3, 0),)), exact=False)
    finally:
        virtual.answers = right


def test_decay_is_part_of_the_group():
    assert cover()[0].group()["weight_decay"] == WEIGHT_DECAY
