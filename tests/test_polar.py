"""Orthogonalizers against a float64 evaluation of their polynomial and against the true polar factor."""

import sys
from types import SimpleNamespace

import pytest
import torch

from shardopt.polar import ORTHOGONALIZERS, Gram, LowRank, NewtonSchulz, Split, orthogonalizer, schedule
from shardopt.polar import ops as operations_module
from shardopt.polar.low_rank import signs

SHAPES = [(7, 15), (16, 17), (1, 1), (1, 9), (33, 5), (2, 3, 40, 64), (96, 24), (24, 96), (50, 50), (400, 450)]
SPECTRA = ["gaussian", "geometric", "power"]


def matrix(shape, spectrum, seed=0):
    """fp32, singular values Gaussian, 1 to 1e-3 in a geometric row, or 1/i."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g, dtype=torch.float64)
    if spectrum != "gaussian":
        u, s, v = torch.linalg.svd(x, full_matrices=False)
        n = s.shape[-1]
        s = torch.logspace(0, -3, n, dtype=torch.float64) if spectrum == "geometric" else 1 / torch.arange(1.0, n + 1)
        x = u * s.double() @ v
    return x.float()


def exact(x, triples, norm="frobenius"):
    """The polynomial in float64 on singular values: U p(S) V^T."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    total = s.pow(2).sum(-1, keepdim=True).sqrt() if norm == "frobenius" else s.pow(4).sum(-1, keepdim=True) ** 0.25
    p = s / total
    sensitive = torch.zeros_like(p)  # what a relative error of any step's values becomes in the end
    for a, b, c in triples:
        slope = a + 3 * b * p**2 + 5 * c * p**4
        sensitive = slope.abs() * torch.maximum(sensitive, p)
        p = p * (a + b * p**2 + c * p**4)
    steepness = float(sensitive.max())
    return u * p.unsqueeze(-2) @ v, steepness


def error(y, z):
    return float((y.double() - z).norm() / z.norm())


def polar(x):
    """The true polar factor, of the singular values that float32 can tell from zero."""
    u, s, v = torch.linalg.svd(x.double(), full_matrices=False)
    return u * (s > 1e-6 * s[..., :1]).unsqueeze(-2) @ v


def cosine(y, z):
    return float((y.double() * z).sum() / (y.double().norm() * z.norm()))


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_direct_form(shape, spectrum):
    """Kills: b and c exchanged; the tall side multiplied out; a step too few; the tight norm not squared on X X^T."""
    x = matrix(shape, spectrum)
    before = x.clone()
    for norm in ("frobenius", "tight"):
        for name in ("quintic", "polar_express", "minimax(0.005)"):
            z, steepness = exact(x, schedule(name, 5), norm)
            y = NewtonSchulz(coefficients=name, norm=norm)(x)
            assert y.shape == x.shape and y.dtype == torch.float32 and y.is_contiguous()
            assert error(y, z) < 1e-5 + 1e-7 * steepness
    assert torch.equal(x, before)


@pytest.mark.parametrize("spectrum", SPECTRA)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_form(shape, spectrum):
    """Rounding of R is amplified where singular values spread. Kills: Q not restarted; R updated from one side."""
    x = matrix(shape, spectrum)
    for norm in ("frobenius", "tight"):
        for restarts, bound in (((2,), 4e-4), ((2, 4), 1.5e-4), ((1, 3), 1.5e-4)):
            z, steepness = exact(x, schedule("polar_express", 5), norm)
            y = Gram(coefficients="polar_express", restarts=restarts, norm=norm, min_aspect=1.0)(x)
            assert error(y, z) < bound + 1e-7 * steepness


@pytest.mark.parametrize("norm", ["frobenius", "tight"])
@pytest.mark.parametrize("shape", [(7, 15), (33, 5), (2, 3, 40, 64), (400, 450)], ids=str)
def test_gram_factor_needs_only_the_gram_matrix(shape, norm):
    """From a float64 R exact to fp32; from fp32 R to its rounding. Kills: iterating in fp32; the factor for unit X."""
    for spectrum, bound in (("gaussian", 3e-5), ("geometric", 4e-3), ("power", 1e-3)):
        x = matrix(shape, spectrum) * 37
        form = Gram(coefficients="polar_express", norm=norm)
        z, _ = exact(x, schedule("polar_express", 5), norm)
        wide = shape[-2] <= shape[-1]
        for dtype, limit in ((torch.float64, 2e-5), (torch.float32, bound)):
            w = x.to(dtype)
            q = form.gram_factor(w @ w.mT if wide else w.mT @ w)
            assert q.dtype == torch.float32
            assert error(q @ x if wide else x @ q, z) < limit
    assert torch.equal(form.gram_factor(torch.zeros(3, 3)) @ torch.zeros(3, 5), torch.zeros(3, 5))


NASTY = {
    "ones": torch.ones(24, 40),
    "one entry": torch.zeros(24, 40).index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(-2.0)),
    "rank one": torch.arange(-11.5, 12)[:, None] * torch.linspace(1, 3, 40),
    "rank one and noise": torch.ones(24, 40) + 1e-3 * matrix((24, 40), "gaussian"),
    "huge": matrix((24, 40), "gaussian") * 1e30,
    "tiny": matrix((24, 40), "gaussian") * 1e-30,
    "subnormal": matrix((24, 40), "gaussian") * 1e-39,
    "identity": torch.eye(24, 40),
    "zero rows": torch.cat((matrix((12, 40), "gaussian"), torch.zeros(12, 40))),
}


@pytest.mark.parametrize("case", NASTY)
@pytest.mark.parametrize("name", [*ORTHOGONALIZERS])
def test_nasty_matrices_keep_their_direction(name, case):
    """Kills: squares before scaling (huge, tiny); a set that reverses; safety left out in 16 bits."""
    x = NASTY[case]
    z = polar(x * 2.0**100 if case in ("tiny", "subnormal") else x)
    work = ORTHOGONALIZERS[name]
    assert cosine(work(x), z) > 0.3  # the noise beside a rank of one is 1e-3 of it, too little for some sets
    if isinstance(work, NewtonSchulz | Gram):
        options = {"coefficients": work.coefficients, "steps": work.steps, "norm": work.norm}
        for dtype in ("fp16", "bf16"):
            for form, bound in ((NewtonSchulz(**options, dtype=dtype), 1.5), (Gram(**options, dtype=dtype), 3)):
                y = form(x)
                assert cosine(y, z) > 0.2 and float(torch.linalg.matrix_norm(y, 2)) < bound


def test_scale_is_without_meaning():
    """Powers of two change no bit, also where squares overflow. Kills: a norm before the scaling; absolute eps."""
    x = matrix((7, 15), "gaussian")
    for work in ORTHOGONALIZERS.values():
        for exponent in (-100, -30, 30, 100):
            assert torch.equal(work(x * 2.0**exponent), work(x))


@pytest.mark.parametrize("work", [*ORTHOGONALIZERS.values(), LowRank(rank=3)], ids=lambda work: work.key())
def test_zero_nan_and_empty(work):
    """Kills: 0 / 0; an exception on NaN; one bad matrix of a batch spoiling the others."""
    assert torch.equal(work(torch.zeros(5, 9)), torch.zeros(5, 9))
    assert work(torch.zeros(0, 5, 9)).shape == (0, 5, 9) and work(torch.zeros(0, 7)).shape == (0, 7)
    x = matrix((3, 5, 9), "gaussian")
    for bad in (float("nan"), float("inf")):
        y = x.clone()
        y[1, 2, 3] = bad
        y = work(y)
        assert torch.isnan(y[1]).all() and torch.equal(y[::2], work(x)[::2])


def test_gradients_do_not_flow():
    assert not NewtonSchulz()(torch.ones(3, 4, requires_grad=True)).requires_grad


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [(7, 15), (15, 7), (1, 9), (33, 5), (40, 64), (130, 57), (400, 384)], ids=str)
def test_bits_do_not_depend_on_the_batch_nor_on_memory(shape, threads):
    """Kills: bmm on CPUs; matrices multiplied where they lie (both differ at (7, 15)); strides handed on."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        x = matrix((3, *shape), "gaussian")
        odd = torch.empty(1 + shape[0] * shape[1])[1:].view(shape)
        for work in (NewtonSchulz(), Gram(norm="tight", min_aspect=1.0), LowRank(rank=4), Split(work=Gram(), sizes=1)):
            y = work(x)
            for k in range(3):
                for same in (x[k], odd.copy_(x[k]), x[k].mT.contiguous().mT):
                    assert torch.equal(work(same), y[k])
    finally:
        torch.set_num_threads(before)


def test_16_bit_errors_are_those_measured():
    """Bounds about 1.5 times the measured. Kills: X rounded to bf16 before the norm."""
    bounds = {  # direct bf16, fp16; Gram fp16 with a restart at 2, at 2 and 4
        "gaussian": (0.017, 0.0025, 0.006, 0.004),
        "geometric": (0.09, 0.012, 0.06, 0.012),
        "power": (0.045, 0.006, 0.016, 0.006),
    }
    for spectrum, limits in bounds.items():
        x = matrix((128, 512), spectrum)
        z, _ = exact(x, schedule("quintic", 5))
        forms = (NewtonSchulz(dtype="bf16"), NewtonSchulz(dtype="fp16"), Gram(dtype="fp16"))
        forms = (*forms, Gram(dtype="fp16", restarts=(2, 4)))
        errors = [error(form(x), z) for form in forms]
        assert all(e < limit for e, limit in zip(errors, limits)), (spectrum, errors)
        assert errors[1] < errors[0] / 4, "fp16 has three bits more"


def test_low_rank_is_the_polar_factor_of_the_leading_directions():
    """Kills: Q^T left out of the product; the sketch of the wrong side; a sketch drawn from the global generator."""
    for shape in ((40, 90), (90, 40), (2, 40, 90)):
        u, _, v = torch.linalg.svd(matrix(shape, "gaussian").double(), full_matrices=False)
        s = torch.zeros(40, dtype=torch.float64)
        s[:6] = torch.tensor([5.0, 4, 3, 3, 2, 1])
        x = (u * s @ v).float()
        state = torch.get_rng_state()
        y = LowRank(rank=6, work=NewtonSchulz(coefficients="polar_express", steps=8))(x)
        assert torch.equal(torch.get_rng_state(), state)
        assert error(y, u[..., :6] @ v[..., :6, :]) < 1e-4
    x = matrix((40, 90), "power")
    assert torch.equal(LowRank(rank=64)(x), NewtonSchulz()(x))
    assert torch.linalg.matrix_rank(LowRank(rank=8)(x)) == 8
    captured = [float((LowRank(rank=8, power_iterations=p)(x) * x).sum()) for p in (0, 2)]
    assert captured[1] > captured[0]


def test_sketches_are_balanced_and_fixed():
    s = signs(512, 128, torch.device("cpu"))
    assert s.abs().eq(1).all() and abs(float(s.mean())) < 0.02
    correlation = (s.mT @ s / 512 - torch.eye(128)).abs().max()
    assert float(correlation) < 0.25  # five standard deviations
    assert torch.equal(signs(512, 3, torch.device("cpu")), s[:, :3])


def test_blocks_of_rows():
    """Kills: one matrix instead of blocks; blocks of columns."""
    x = matrix((2, 12, 10), "gaussian")
    work = NewtonSchulz()
    for sizes, cuts in ((4, (4, 4, 4)), ((6, 3, 3), (6, 3, 3)), ((12,), (12,))):
        expected = torch.cat([work(part) for part in x.split(cuts, dim=1)], dim=1)
        assert torch.equal(Split(work=work, sizes=sizes)(x), expected)
    with pytest.raises(ValueError, match="12 rows"):
        Split(work=work, sizes=5)(x)
    with pytest.raises(ValueError, match="12 rows"):
        Split(work=work, sizes=(6, 5))(x)


@pytest.mark.parametrize("rows", [383, 384, 400, 513, 777])
def test_panels_are_whole_products(rows):
    """Kills: a panel's mirror left out; the last panel cut short; `add` taken untransposed from another panel."""
    x = matrix((rows, 90), "gaussian")
    r = x @ x.mT / 90
    z = r @ r
    cpu, whole = operations_module.CPU, operations_module.TORCH
    torch.testing.assert_close(cpu.gram(x), whole.gram(x), atol=1e-4, rtol=1e-5)
    ours = cpu.symmetric(r, z, r, beta=-0.7, alpha=0.3)
    torch.testing.assert_close(ours, whole.symmetric(r, z, r, beta=-0.7, alpha=0.3), atol=1e-2, rtol=1e-4)
    assert operations_module.operations(x) is cpu


def test_quack_is_called_with_its_own_conventions(monkeypatch):
    """The package takes (M, K) and (K, M), and numbers as floats. Kills: b transposed; an int for alpha."""
    calls = []

    def gemm_symmetric(a, b, C=None, alpha=1.0, beta=1.0):
        assert isinstance(alpha, float) and isinstance(beta, float)
        calls.append(a.shape)
        return alpha * (a @ b) + (0 if C is None else beta * C)

    monkeypatch.setitem(
        sys.modules, "quack", SimpleNamespace(gemm_interface=SimpleNamespace(gemm_symmetric=gemm_symmetric))
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    operations_module.quack.cache_clear()
    kernel = operations_module.quack(torch.device("cuda"))
    x = matrix((2, 16, 24), "gaussian").half()
    r = kernel.gram(x)
    assert torch.equal(r, x @ x.mT)
    torch.testing.assert_close(
        kernel.symmetric(r, r, r, 2, 3).float(), (2 * r.float() + 3 * r.float() @ r.float()), rtol=1e-2, atol=1.0
    )
    assert len(calls) == 2
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    operations_module.quack.cache_clear()
    assert operations_module.quack(torch.device("cuda")) is None
    operations_module.quack.cache_clear()


@pytest.mark.parametrize("name", ORTHOGONALIZERS)
def test_descriptions_are_read_back(name):
    """Kills: an option left out of the description, options of a nested orthogonalizer evaluated."""
    for made in (ORTHOGONALIZERS[name], LowRank(rank=7, work=ORTHOGONALIZERS[name])):
        assert orthogonalizer(made.describe()) == made
    for bad in ("no_such", "newton_schulz(stepz=3)", "gram(", "gram(steps=__import__('os'))", "quintic(steps=3)"):
        with pytest.raises(ValueError):
            orthogonalizer(bad)
