"""The table that every generic test walks: rules, state formats, add-ons, write policies, dtypes, awkward shapes.

A row more here tests the newcomer against everything. `cover()` picks, seeded, so few combinations that every pair
of entries still meets; `benchmarks/soak.py` draws from the full product.
"""

import random
from collections.abc import Callable, Iterator
from functools import cache
from itertools import combinations, product
from typing import Any, NamedTuple

import torch

from shardopt import Recipe
from shardopt.rules import SGD, Adafactor, AdamW, Lion, RMSprop, Rule

# Hyper-parameters are odd on purpose: a forgotten or swapped one must show.
RULES: dict[str, Callable[[], Rule]] = {
    "adamw": lambda: AdamW(lr=3e-3, betas=(0.83, 0.957), eps=1e-7),
    "adamw.atan2": lambda: AdamW(lr=2e-3, betas=(0.81, 0.93), atan2=True),
    "adamw.nesterov": lambda: AdamW(lr=4e-3, betas=(0.77, 0.97), eps=1e-6, nesterov=True),
    "adamw.no_momentum": lambda: AdamW(lr=1e-3, betas=(0.0, 0.93)),
    "adamw.no_correction": lambda: AdamW(lr=1e-3, betas=(0.88, 0.97), bias_correction=False),
    "lion": lambda: Lion(lr=7e-4, betas=(0.87, 0.973)),
    "sgd": lambda: SGD(lr=0.11),
    "sgd.momentum": lambda: SGD(lr=0.07, momentum=0.83),
    "sgd.nesterov": lambda: SGD(lr=0.05, momentum=0.77, nesterov=True),
    "sgd.dampening": lambda: SGD(lr=0.09, momentum=0.87, dampening=0.3),
    "rmsprop": lambda: RMSprop(lr=3e-3, alpha=0.93, eps=1e-6),
    "rmsprop.centered": lambda: RMSprop(lr=2e-3, alpha=0.91, momentum=0.7, centered=True, eps=1e-4),
    "rmsprop.corrected": lambda: RMSprop(lr=1e-3, alpha=0.95, bias_correction=True),
    "adafactor": lambda: Adafactor(lr=2e-2),
    "adafactor.update": lambda: Adafactor(lr=3e-2, beta1=0.86, d=0.7),
    "adafactor.raw": lambda: Adafactor(lr=1e-2, beta1=0.79, momentum="raw", relative_step=False, scale_parameter=False),
    "adafactor.fixed": lambda: Adafactor(
        lr=3e-3,
        beta2=0.97,
        beta1=0.9,
        d=0.0,
        bias_correction=True,
        relative_step=False,
        scale_parameter=False,
        decay="decoupled",
    ),
    "adafactor.hf": lambda: Adafactor(lr=4e-2, beta2_decay=-0.7, eps=(1e-30, 2e-3), eps_mode="add", decay="scaled"),
}

# (signed slots, non-negative slots)
STATES: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "fp16": ("fp16", "fp16"),
    "int8+log8": ("int8", "log8"),
    "sqrt8+root4": ("sqrt8", "root4(block=64)"),
    "dyn8": ("dyn8(block=32)", "dyn8"),
    "fp8": ("fp8(block=128)", "fp8"),
    "int4+log4": ("int4", "log4"),
    "dyn4+log16": ("dyn4(block=32)", "log16"),
    "sqrt8+factored": ("sqrt8(block=8)", "factored"),
}

ADDONS: dict[str, tuple[str, ...]] = {
    "none": (),
    "decay": ("decay",),
    "cautious_decay": ("cautious_decay",),
    "l2": ("l2",),
    "cautious": ("cautious", "decay"),
    "grams": ("grams", "cautious_decay"),
    "rms_clip": ("rms_clip", "decay"),
    "clip": ("clip_by_global_norm", "decay"),
    "centralized": ("gradient_centralization",),
    "orthograd": ("orthograd", "decay"),
    "mars": ("mars", "decay"),
    "all": ("clip_by_global_norm", "gradient_centralization", "orthograd", "cautious", "cautious_decay"),
}
WEIGHT_DECAY = 0.13

ROUNDINGS = ("nearest", "stochastic", "kahan")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FROM = ("fresh", "stored")

SHAPES: tuple[tuple[int, ...], ...] = (
    (7, 15),  # smaller than every block, odd
    (2, 16),  # fewer rows than ranks
    (1, 1),
    (7,),  # a vector: fp32 state, uneven
    (),  # a scalar
    (33, 64),  # below the gate of 4096 elements
    (70, 130),  # above it; a short last block; halves cut columns inside a block
    (64, 64),  # exactly at the gate
    (128, 96),
    (5, 3, 40),  # a stack of matrices, below the gate
    (4, 32, 48),  # a stack above it
    (4, 6, 3, 3),  # a convolution, below the gate
    (66, 9, 3, 3),  # a convolution above it: view (66, 81)
    (12, 512),  # two whole blocks a row
    (1400, 3),  # a last dimension of 3: never quantised
)

# Tolerances, each with its reason.
UNSHARDED = 1e-6  # of the tensor's norm, where sums were asked: contracts.md section 7, float64 partial sums
FLIPS = 1e-5  # share of stored codes and stochastically written values that may differ, by one code
TORCH = 1e-6  # of the tensor's norm after 50 fp32 steps: about 150 roundings of 3.4e-8 each, at random
TORCH_FEW = 2e-6  # the same below 64 elements, which do not average: torch itself is 9e-7 from float64, we are 2e-7
SPEC = 1e-6  # the same against float64, where only one side rounds


class Case(NamedTuple):
    """One combination, all by name except the shape."""

    rule: str
    state: str
    addons: str
    rounding: str
    dtype: str
    source: str
    shape: tuple[int, ...]

    def recipe(self) -> Recipe:
        return recipe(self.rule, self.state, self.addons, self.rounding, self.source)

    def group(self) -> dict[str, Any]:
        """A param group of this recipe's numbers."""
        return {**self.recipe().defaults(), "weight_decay": WEIGHT_DECAY}

    def name(self) -> str:
        return "-".join((*self[:-1], "x".join(map(str, self.shape)) or "scalar"))


def recipe(rule: str, state: str = "fp32", addons: str = "none", rounding: str = "nearest", source: str = "fresh"):
    formats = dict(zip(("signed", "non_negative"), STATES[state]))
    return Recipe(RULES[rule](), formats, ADDONS[addons], rounding, source)


def excluded(rule: str, addons: str) -> bool:
    """Whether the recipe refuses this pair (Lion and RMS clip, say): the same one sentence for every user."""
    try:
        recipe(rule, addons=addons)
    except ValueError:
        return True
    return False


FACTORS: tuple[tuple[Any, ...], ...] = (
    tuple(RULES), tuple(STATES), tuple(ADDONS), ROUNDINGS, tuple(DTYPES), FROM, SHAPES,
)  # fmt: skip


def pairs_of(case: tuple[Any, ...]) -> set[tuple[int, Any, int, Any]]:
    return {(i, case[i], j, case[j]) for i, j in combinations(range(len(case)), 2)}


@cache
def cover(seed: int = 2024, tries: int = 40) -> tuple[Case, ...]:
    """Cases in which every allowed pair of entries of two factors meets at least once: greedy, seeded."""
    draw = random.Random(seed)
    forbidden = {(r, a) for r, a in product(RULES, ADDONS) if excluded(r, a)}
    wanted = {
        (i, x, j, y)
        for i, j in combinations(range(len(FACTORS)), 2)
        for x, y in product(FACTORS[i], FACTORS[j])
        if not ((i, j) == (0, 2) and (x, y) in forbidden)
    }
    cases = []
    while wanted:
        i, x, j, y = draw.choice(sorted(wanted, key=repr))
        candidates = []
        for _ in range(tries):
            case = [draw.choice(entries) for entries in FACTORS]
            case[i], case[j] = x, y
            if (case[0], case[2]) not in forbidden:
                candidates.append(tuple(case))
        best = max(candidates, key=lambda case: len(pairs_of(case) & wanted))
        wanted -= pairs_of(best)
        cases.append(Case(*best))
    return tuple(cases)


def gradients(shape: tuple[int, ...], steps: int, seed: int = 7) -> Iterator[torch.Tensor]:
    """Gradients that hurt: sizes over several decades by row and column, exact zeros, and a drop in the middle."""
    draw = torch.Generator().manual_seed(seed)
    spread = torch.exp2(3 * torch.randn(shape, generator=draw))
    for step in range(steps):
        g = torch.randn(shape, generator=draw) * spread * (0.05 if step >= steps // 2 else 1.0) * 1e-2
        yield torch.where(torch.rand(shape, generator=draw) < 0.1, 0.0, g)


def weights(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=draw) * 0.3).to(dtype)
