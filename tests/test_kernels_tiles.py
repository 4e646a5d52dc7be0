"""Calm tiles on the emulated GPU: short cuts that leave every bit as it is, whatever the numbers; and their price."""

import ctypes

import pytest
import torch
from torch import nn

import shardopt
from benchmarks import sass
from shardopt import Recipe
from shardopt.kernels import cuda, key_at
from shardopt.kernels.cache import NoCompiler
from shardopt.rules import AdamW
from tests.fake_gpu import emulated, gpu  # noqa: F401
from tests.kernel_kit import differences
from tests.test_kernels_cuda import BUDGET, KEY_OF_BUDGET

LARGEST = torch.finfo(torch.bfloat16).max


def spread(g):
    """Magnitudes over 17 decades within a block, a third of it 0: codes of 0 and 1 beside large ones."""
    scales = 10.0 ** (17 * torch.rand(g.shape) - 12)
    return g * scales * (torch.rand(g.shape) > 0.3)


def wide(g):
    """Squares of 2^-90 to 2^48 in every block."""
    return g.sign() * 2.0 ** (69 * torch.rand(g.shape) - 40)


def abyss(g):
    """Subnormal squares, tiny ones and 0 beside large ones."""
    return g * 10.0 ** (36 * torch.rand(g.shape) - 30)


def with_one_broken(g):
    """NaN, infinite and finite gradients, one bad element a row at most."""
    g[1, 5], g[2, 300], g[3, 255] = float("nan"), float("inf"), -float("inf")
    return g


INT4 = Recipe(AdamW(), "int4", ("cautious_decay",), "stochastic")
KEY_OF_INT4 = key_at(INT4, (4096, 4096), torch.bfloat16, torch.bfloat16)
RECIPES = {"int8": (BUDGET, KEY_OF_BUDGET), "int4": (INT4, KEY_OF_INT4)}

BOTH, NEITHER = ("int8", "int4"), ()
# name -> (shape, gradient of normal numbers, parameter of normal numbers, states with calm tiles, those with no other)
INPUTS = {
    "usual": ((9, 1000), lambda g: g, lambda p: p, BOTH, NEITHER),
    "beyond 2^16 columns": ((4, 67000), lambda g: g, lambda p: p, BOTH, NEITHER),
    "tiny": ((9, 1024), lambda g: g * 1e-17, lambda p: p, NEITHER, NEITHER),
    "huge": ((9, 1024), lambda g: g * 1e18, lambda p: p, NEITHER, NEITHER),
    "spread": ((64, 1024), spread, lambda p: p, BOTH, NEITHER),
    "wide": ((64, 1024), wide, lambda p: p, BOTH, NEITHER),
    "abyss": ((64, 1024), abyss, lambda p: p, NEITHER, NEITHER),
    "zero": ((9, 1024), lambda g: g * 0, lambda p: p, BOTH, BOTH),
    "small steps": ((64, 1024), lambda g: g * 1e-3, lambda p: p * 1e-4, BOTH, NEITHER),
    "broken gradients": ((9, 1024), with_one_broken, lambda p: p, BOTH, NEITHER),
    "largest parameters": ((17, 512), lambda g: g, lambda p: torch.where(p > 2.9, LARGEST, p), BOTH, NEITHER),
    "broken parameters": ((9, 512), lambda g: g, lambda p: torch.where(p > 2.9, float("nan"), p), BOTH, NEITHER),
}


def stepped(name, recipe, fused, steps=3):
    shape, gradient, parameter, *_ = INPUTS[name]
    torch.manual_seed(3)
    p = nn.Parameter(parameter(torch.randn(shape)).bfloat16())
    opt = shardopt.ShardedOptimizer([p], recipe, fused=fused, lr=1e36 if "largest" in name else 1e-2, weight_decay=0.1)
    for _ in range(steps):
        p.grad = gradient(torch.randn(shape)).bfloat16()
        opt.step()
    return {"p": p.detach(), **opt.state[p]}


@pytest.mark.parametrize("state", RECIPES)
@pytest.mark.parametrize("name", INPUTS)
def test_calm_tiles_change_no_bit(gpu, name, state):  # noqa: F811
    """Kills: no doubt about approximated codes, a margin of 1, numbers that are tiny, huge or broken taken for calm,
    noise by additions across 2^16 columns, parameters rounded beyond the largest; a block's values looked up in the
    other half of the warp. Roots and logarithms are as wrong here as they may be."""
    recipe, key = RECIPES[state]
    tiles = counted(lambda: emulated(key).driver.library)
    before = tiles()
    assert differences(stepped(name, recipe, False), stepped(name, recipe, True)) == []
    shape, *_, some, every = INPUTS[name]
    whole = 3 * shape[0] * (shape[1] // 256)
    assert gpu and (tiles() - before > 0) == (state in some) and (tiles() - before == whole) >= (state in every)


def counted(library):
    """How many calm tiles the emulated GPU has stepped so far."""
    count = library().shardopt_calm
    count.restype = ctypes.c_longlong
    return count


# (state, fast): instructions an element at most; the special ones of them, of which a GPU does a quarter as many
LIMITS = {("int8", True): 75, ("int8", False): 95, ("int4", True): 83, ("int4", False): 98}


@pytest.mark.parametrize("state, fast", LIMITS)
def test_budget_of_instructions(state, fast):
    """Kills: a second body for tails within the loop, addresses by element, exact roots in codes, searches of a table
    or float64 by element, float64 constants that are not operands, a loop whose doubts a compiler has lost."""
    key = RECIPES[state][1]
    try:
        sass.nvdisasm()
        facts, way = sass.facts_of(key, "sm_90", fast)
    except (NoCompiler, SystemExit) as why:
        pytest.skip(str(why))
    assert facts["instructions"] <= LIMITS[state, fast] and facts["special functions and conversions"] <= 8, facts
    assert facts["loads and stores of 16 bytes"] == 3 and facts["local memory"] == 0, facts
    assert not fast or facts["registers"] <= 64, facts
    assert cuda.entry_of(key, "sm_90", fast).facts()["report"]["stack"] == 0
    assert sum("U16x2" in one.name for one in way) == 8, "four pairs of elements of two slots are asked for doubts"
