"""Coefficient sets: published numbers, positivity, the intervals that they leave; keys, FLOP counts and refusals."""

import pytest
import torch

from shardopt.polar import SETS, Gram, LowRank, NewtonSchulz, Split, minimax, orthogonalizer, schedule
from shardopt.polar.coefficients import CUSHION, default_safety
from shardopt.polar.minimax import LIMIT, value

# arXiv 2505.16932
POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
)
# A published set of four steps that returns the negative polar factor above .8837
REVERSING = (
    (4.0098, -7.0585, 2.4635),
    (3.4585, -5.5479, 2.5959),
    (2.7573, -3.2939, 1.4254),
    (2.7215, -3.0494, 1.3169),
)
GENERATED = ("minimax(0.001)", "minimax(0.005)", "minimax(0.0001, 0.02)", "minimax(0.05)")


def mapped(triples, lower, points=20001):
    """Singular values in [lower, 1], float64, and what the steps make of them."""
    start = s = torch.logspace(0, 1, points, base=lower, dtype=torch.float64)
    for triple in triples:
        s = value(triple, s)
    return start, s


def reversed_at(triples):
    """Singular values in (0, 1] whose vectors would be reversed."""
    start, s = mapped(triples, 1e-9)
    dense = torch.linspace(1e-4, 1, 20001, dtype=torch.float64)
    t = dense
    for triple in triples:
        t = value(triple, t)
    return torch.cat((start[s <= 0], dense[t <= 0]))


def test_remez_gives_the_published_numbers():
    """Kills: no recentring after the cushion; upper edge 1 at every step."""
    for ours, published in zip(minimax(1e-3, 9, CUSHION), (*POLAR_EXPRESS, LIMIT, LIMIT), strict=True):
        assert ours == pytest.approx(published, abs=1e-10)


@pytest.mark.parametrize(
    "steps, lower, error", [(4, 5e-3, 0.083), (5, 3e-3, 0.005), (5, 1e-3, 0.113), (6, 1e-3, 0.001), (3, 0.03, 0.036)]
)
def test_the_error_of_a_composition_is_that_of_its_edges(steps, lower, error):
    """Kills: critical points exchanged with the edges; one step too few."""
    _, s = mapped(minimax(lower, steps), lower)
    assert float((s - 1).abs().max()) == pytest.approx(error, rel=0.1)
    assert float(s[-1]) == pytest.approx(float(s.min()), abs=1e-12), "the lower edge is one of the extremes"


def test_nothing_near_by_is_better():
    """The quintic of one step against perturbed ones. Kills: a wrong sign in the system of equations."""
    (best,) = minimax(0.1, 1)

    def error(triple):
        return float((mapped((triple,), 0.1)[1] - 1).abs().max())

    for k in range(3):
        for change in (-0.01, 0.01):
            moved = tuple(entry + change * (index == k) for index, entry in enumerate(best))
            assert error(moved) > error(best)


@pytest.mark.parametrize("name", [*SETS, *GENERATED])
@pytest.mark.parametrize("steps", range(1, 9))
def test_no_singular_vector_is_reversed(name, steps):
    """Kills: any set that is negative somewhere on (0, 1], such as REVERSING."""
    for safety in (1.0, 1.01):
        assert not len(reversed_at(schedule(name, steps, safety)))


def test_the_check_of_signs_sees_a_reversing_set():
    at = reversed_at(REVERSING)
    assert float(at.min()) == pytest.approx(0.8837, abs=1e-3) and float(at.max()) == 1.0


@pytest.mark.parametrize("name", SETS)
def test_intervals_are_as_stated(name):
    """Kills: a first digit after the point of cans changed."""
    for lower, stated in ((1e-2, SETS[name].interval_2), (1e-3, SETS[name].interval_3)):
        _, s = mapped(schedule(name, 5), lower)
        assert (float(s.min()), float(s.max())) == pytest.approx(stated, abs=6e-4)


def test_polar_express_with_its_safety_factor():
    _, s = mapped(schedule("polar_express", 6, 1.01), 1e-3)
    assert (float(s.min()), float(s.max())) == pytest.approx((0.994, 1.001), abs=6e-4)


def test_sequences():
    """Kills: the limit appended to a repeated triple; a set repeated instead of followed by the limit."""
    jordan = (3.4445, -4.7750, 2.0315)
    assert schedule("quintic", 7) == (jordan,) * 7
    assert schedule(jordan, 2) == (jordan,) * 2
    assert schedule((jordan,), 3) == (jordan, LIMIT, LIMIT)
    assert schedule("cans", 3) == SETS["cans"].triples[:3]
    assert schedule("you", 7)[5:] == (LIMIT, LIMIT)
    assert schedule("minimax(0.01)", 3) == minimax(0.01, 3)
    a, b, c = schedule("cans", 6, 1.1)[0]
    assert (a * 1.1, b * 1.1**3, c * 1.1**5) == pytest.approx(SETS["cans"].triples[0])
    assert schedule("cans", 6, 1.1)[5] == LIMIT


def test_default_safety():
    assert default_safety("polar_express", True) == default_safety("minimax(0.1)", True) == 1.01
    assert default_safety("polar_express", False) == default_safety("quintic", True) == 1.0
    assert default_safety((1.0, 2.0, 3.0), True) == 1.0


@pytest.mark.parametrize(
    "coefficients",
    [
        "jordan",
        "minimax()",
        "minimax(x)",
        "minimax(1.0)",
        "minimax(2.0)",
        "minimax(0.1, 1.0)",
        "minimax(0.1, 0.1, 0.1)",
        (),
        (1.0, 2.0),
        3,
    ],
)
def test_what_is_no_set_is_refused_with_words(coefficients):
    with pytest.raises(ValueError, match=r"minimax"):
        schedule(coefficients, 5)


@pytest.mark.parametrize("steps, safety", [(0, 1.0), (5, 0.9)])
def test_steps_and_safety_are_checked(steps, safety):
    with pytest.raises(ValueError, match="at least 1"):
        schedule("quintic", steps, safety)


def test_flops():
    """The published counts. Kills: rows taken for the small side; a restart counted as none."""
    r, large = 100, 350
    for rows, cols in ((r, large), (large, r)):
        assert NewtonSchulz().flops(rows, cols) == 15 * r * r * large + 5 * r**3
        assert Gram(restarts=()).flops(rows, cols) == 3 * r * r * large + 17 * r**3
        assert Gram().flops(rows, cols) == 6 * r * r * large + 14 * r**3
        assert Gram(min_aspect=4.0).flops(rows, cols) == NewtonSchulz().flops(rows, cols)
        assert LowRank(rank=500).flops(rows, cols) == NewtonSchulz().flops(rows, cols)
        assert LowRank(rank=8).flops(rows, cols) < NewtonSchulz().flops(rows, cols)
    assert Split(work=NewtonSchulz(), sizes=25).flops(100, 350) == 4 * NewtonSchulz().flops(25, 350)


def test_keys_are_unique_and_objects_hashable():
    forms = [
        *(NewtonSchulz(coefficients=name) for name in (*SETS, "minimax(0.01)", "minimax(0.02)", (1.5, -0.5, 0.0))),
        *(NewtonSchulz(coefficients=((1.5, -0.5, 0.0),)), NewtonSchulz(steps=4), NewtonSchulz(safety=1.01)),
        *(NewtonSchulz(dtype=dtype) for dtype in ("fp32", "bf16", "fp16")),
        *(NewtonSchulz(norm="tight"), Gram(), Gram(restarts=(2, 4)), Gram(restarts=()), Gram(min_aspect=1.0)),
        *(LowRank(), LowRank(rank=8), LowRank(power_iterations=0), LowRank(work=Gram())),
        *(Split(work=Gram(), sizes=8), Split(work=Gram(), sizes=(8,)), Split(work=NewtonSchulz(), sizes=8)),
    ]
    keys = [form.key() for form in forms]
    assert len(set(keys)) == len(set(forms)) == len(forms)
    assert not any(" " in key for key in keys)
    assert NewtonSchulz(coefficients="polar_express", dtype="fp32").key() == "newton_schulz.polar_express.k5.fp32"
    assert Split(work=Gram(steps=4), sizes=8).describe() == "split(work=gram(steps=4), sizes=8)"


def test_names():
    assert orthogonalizer("quintic") == NewtonSchulz() and orthogonalizer(Gram()) == Gram()
    with pytest.raises(ValueError, match="polar_express"):
        orthogonalizer("svd")


@pytest.mark.parametrize(
    "make",
    [
        lambda: NewtonSchulz(dtype="fp8"),
        lambda: NewtonSchulz(norm="spectral"),
        lambda: NewtonSchulz(eps=0.0),
        lambda: NewtonSchulz(coefficients="jordan"),
        lambda: Gram(dtype="bf16", restarts=()),
        lambda: Gram(restarts=(3, 2)),
        lambda: Gram(restarts=(0,)),
        lambda: Gram(min_aspect=0.5),
        lambda: LowRank(rank=0),
        lambda: LowRank(power_iterations=-1),
        lambda: Split(work=Gram(), sizes=0),
        lambda: NewtonSchulz()(torch.ones(5)),
        lambda: NewtonSchulz()(torch.ones(5, 5, dtype=torch.float64)),
    ],
)
def test_what_cannot_be_is_refused(make):
    with pytest.raises(ValueError, match=r"got"):
        make()
