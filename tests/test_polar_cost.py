"""What orthogonalizers multiply: counted as torch runs it, against `flops()`, which the planner balances by."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shardopt.polar import Gram, LowRank, NewtonSchulz
from shardopt.polar import ops as operations_module
from tests.table import weights


def counted(work, rows, cols):
    """FLOP of the products of `work` on such a matrix."""
    x = weights((rows, cols))
    with FlopCounterMode(display=False) as counter:
        work(x)
    return counter.get_total_flops()


@pytest.mark.parametrize("rows, cols", [(60, 90), (90, 60), (60, 89), (50, 300), (300, 50), (70, 70)])
def test_small_matrices(rows, cols):
    """Whole products, of which `flops` counts the symmetric ones half. Kills: a form that is never chosen, an edge at
    which the count chooses another than the iteration."""
    r, large = sorted((rows, cols))
    direct = 5 * (4 * r * r * large + 2 * r**3)
    assert counted(NewtonSchulz(), rows, cols) == direct
    assert NewtonSchulz().flops(rows, cols) == direct - 5 * (r * r * large + r**3)
    in_gram_form = large >= 1.5 * r
    expected = 8 * r * r * large + 28 * r**3 if in_gram_form else direct  # of a step 4 products, 3 fewer a segment
    assert counted(Gram(), rows, cols) == expected
    halves = 2 * r * r * large + 14 * r**3 if in_gram_form else 5 * (r * r * large + r**3)
    assert Gram().flops(rows, cols) == expected - halves


@pytest.mark.parametrize("rows", [384, 400, 512, 777])
def test_panels_spare_products(rows):
    """Of symmetric results 5/8, more where rows are no multiple of 256. Kills: whole products; panels of one row, or of
    all."""
    panels = operations_module.panels(rows)
    assert [first for first, _ in panels[1:]] == [last for _, last in panels[:-1]] and panels[-1][1] == rows
    assert 3 <= len(panels) <= 4 and all(first % 64 == 0 for first, _ in panels)
    r, cpu = weights((rows, rows)), operations_module.CPU
    part = sum((last - first) * last for first, last in panels) / rows**2
    assert 0.62 < part < 0.7
    assert counted(cpu.gram, rows, 90) == pytest.approx(part * 2 * rows * rows * 90)
    assert counted(lambda _: cpu.symmetric(r, r, r, beta=1.0), rows, 90) == pytest.approx(part * 2 * rows**3)


@pytest.mark.parametrize("rows, cols", [(60, 90), (90, 60)])
@pytest.mark.parametrize("power_iterations", [0, 1, 3])
def test_low_rank(rows, cols, power_iterations):
    """Kills: products left out of the count, a power iteration of one product."""
    work = LowRank(rank=8, power_iterations=power_iterations)
    products = counted(work, rows, cols) - counted(NewtonSchulz(), 8, 90)
    assert products == (3 + 2 * power_iterations) * 2 * 60 * 90 * 8
    factorizations = (1 + power_iterations) * 4 * 60 * 8 * 8
    assert work.flops(rows, cols) == products + factorizations + NewtonSchulz().flops(8, 90)


def test_least_of_everything():
    """Kills: a bound that leaves out the smallest that works."""
    assert LowRank(rank=1, power_iterations=0)(weights((6, 9))).isfinite().all()
    assert NewtonSchulz(steps=1)(weights((1, 1))).shape == (1, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(64, 96), (3, 64, 96), (64, 90), (60, 96), (63, 72)])
def test_who_multiplies(monkeypatch, shape, dtype):
    """Kills: symmetric kernels given float32, or rows that no 16-byte load can address."""
    monkeypatch.setattr(operations_module, "quack", lambda device: "quack")
    x = SimpleNamespace(device=torch.device("cuda"), dtype=dtype, shape=torch.Size(shape))
    fit = dtype != torch.float32 and all(n % 8 == 0 for n in shape[-2:])
    assert operations_module.operations(x) == ("quack" if fit else operations_module.TORCH)
    monkeypatch.setattr(operations_module, "quack", lambda device: None)
    assert operations_module.operations(x) is operations_module.TORCH
