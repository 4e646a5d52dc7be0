"""Calm tiles on the emulated GPU: short cuts that leave every bit as it is, whatever the numbers; and their price."""

import ctypes

import pytest
import torch
from torch import nn

import shardopt
from benchmarks import sass
from shardopt.kernels import cuda
from shardopt.kernels.cache import NoCompiler
from tests.fake_gpu import emulated, gpu  # noqa: F401
from tests.kernel_kit import differences
from tests.test_kernels_cuda import BUDGET, KEY_OF_BUDGET

LARGEST = torch.finfo(torch.bfloat16).max


def spread(g):
    """Magnitudes over 17 decades within a block, a third of it 0: codes of 0 and 1 beside large ones."""
    scales = 10.0 ** (17 * torch.rand(g.shape) - 12)
    return g * scales * (torch.rand(g.shape) > 0.3)


def abyss(g):
    """Subnormal squares, tiny ones and 0 beside large ones."""
    return g * 10.0 ** (36 * torch.rand(g.shape) - 30)


def with_one_broken(g):
    """NaN, infinite and finite gradients, one bad element a row at most."""
    g[1, 5], g[2, 300], g[3, 255] = float("nan"), float("inf"), -float("inf")
    return g


# name -> (shape, gradient of normal numbers, parameter of normal numbers, whether some tiles, or all, are calm)
INPUTS = {
    "usual": ((9, 1000), lambda g: g, lambda p: p, (True, False)),
    "beyond 2^16 columns": ((4, 67000), lambda g: g, lambda p: p, (True, False)),
    "tiny": ((9, 1024), lambda g: g * 1e-17, lambda p: p, (False, False)),
    "huge": ((9, 1024), lambda g: g * 1e18, lambda p: p, (False, False)),
    "spread": ((64, 1024), spread, lambda p: p, (True, False)),
    "abyss": ((64, 1024), abyss, lambda p: p, (False, False)),
    "zero": ((9, 1024), lambda g: g * 0, lambda p: p, (True, True)),
    "small steps": ((64, 1024), lambda g: g * 1e-3, lambda p: p * 1e-4, (True, False)),
    "broken gradients": ((9, 1024), with_one_broken, lambda p: p, (True, False)),
    "largest parameters": ((17, 512), lambda g: g, lambda p: torch.where(p > 2.9, LARGEST, p), (True, False)),
    "broken parameters": ((9, 512), lambda g: g, lambda p: torch.where(p > 2.9, float("nan"), p), (True, False)),
}


def stepped(name, fused, steps=3):
    shape, gradient, parameter, _ = INPUTS[name]
    torch.manual_seed(3)
    p = nn.Parameter(parameter(torch.randn(shape)).bfloat16())
    opt = shardopt.ShardedOptimizer([p], BUDGET, fused=fused, lr=1e36 if "largest" in name else 1e-2, weight_decay=0.1)
    for _ in range(steps):
        p.grad = gradient(torch.randn(shape)).bfloat16()
        opt.step()
    return {"p": p.detach(), **opt.state[p]}


@pytest.mark.parametrize("name", INPUTS)
def test_calm_tiles_change_no_bit(gpu, name):  # noqa: F811
    """Kills: no doubt about approximated codes, a margin of 1, numbers that are tiny, huge or broken taken for calm,
    noise by additions across 2^16 columns, parameters rounded beyond the largest. Roots are off by up to 2 ulp here."""
    tiles = counted(lambda: emulated(KEY_OF_BUDGET).driver.library)
    before = tiles()
    assert differences(stepped(name, False), stepped(name, True)) == []
    some, every = INPUTS[name][3]
    shape = INPUTS[name][0]
    whole = 3 * shape[0] * (shape[1] // 256)
    assert gpu and (tiles() - before > 0) == some and (tiles() - before == whole) >= every


def counted(library):
    """How many calm tiles the emulated GPU has stepped so far."""
    count = library().shardopt_calm
    count.restype = ctypes.c_longlong
    return count


@pytest.mark.parametrize("fast, most", [(True, 75), (False, 95)])
def test_budget_of_instructions(fast, most):
    """Kills: a second body for tails within the loop, addresses by element, exact roots in codes, look-ups."""
    try:
        sass.nvdisasm()
        facts, _ = sass.facts_of(KEY_OF_BUDGET, "sm_90", fast)
    except (NoCompiler, SystemExit) as why:
        pytest.skip(str(why))
    assert facts["instructions"] <= most and facts["special functions and conversions"] <= 8, facts
    assert facts["loads and stores of 16 bytes"] == 3 and facts["local memory"] == 0, facts
    assert not fast or facts["registers"] <= 64, facts
    assert cuda.entry_of(KEY_OF_BUDGET, "sm_90", fast).facts()["report"]["stack"] == 0
