"""Stepping one case of the table twice, by the reference and by kernels, and comparing every bit."""

from collections.abc import Iterable, Iterator
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import shardopt
from shardopt.kernels import Key, NoTwin, key_at
from tests.table import DTYPES, Case, cover, gradients, pairs_of, weights

GRADIENTS = {  # of these parameters: every pairing of dtypes meets
    torch.float32: (torch.float32, torch.bfloat16, torch.float16),
    torch.bfloat16: (torch.bfloat16, torch.float32, torch.float16),
    torch.float16: (torch.float16, torch.float32, torch.bfloat16),
}


class Difference(NamedTuple):
    """How far a tensor of the kernel is from the reference's: elements that differ, and by how much at most."""

    name: str
    elements: int
    largest: float


def paired(cases: Iterable[Case]) -> Iterator[tuple[Case, torch.dtype, Key]]:
    """The cases whose recipe has a twin, their parameters' and gradients' dtypes paired in turn."""
    for i, case in enumerate(dict.fromkeys(cases)):
        dtype = DTYPES[case.dtype]
        gradient = GRADIENTS[dtype][i % 3]
        with suppress(NoTwin):
            yield case, gradient, key_at(case.recipe(), case.shape, dtype, gradient)


def native_cases() -> Iterator[tuple[Case, torch.dtype]]:
    """Every case of the cover whose recipe asks nothing and steps from fresh values."""
    every = (case._replace(source="fresh") for case in [*cover(), *cover(seed=7)[:100]])
    yield from ((case, gradient) for case, gradient, key in paired(every) if not key.passes)


def asking_cases(count: int = 40) -> list[tuple[Case, torch.dtype]]:
    """So many cases of kernels in passes, or from what is stored, that between them meet as many pairs as can be."""
    left = [(case, gradient) for case, gradient, key in paired(cover()) if key.passes]
    chosen: list[tuple[Case, torch.dtype]] = []
    met: set[Any] = set()
    for _ in range(count):
        best = max(left, key=lambda one: len(pairs_of(one[0]) - met))
        left.remove(best)
        chosen.append(best)
        met |= pairs_of(best[0])
    return chosen


def optimizer_of(case: Case, dtype: torch.dtype, gradient: torch.dtype, **options: Any) -> Any:
    """An optimizer over one parameter of the case, its gradient's dtype allowed to differ."""
    p = nn.Parameter(weights(case.shape, dtype))
    if gradient != dtype:
        p.grad_dtype = gradient
    recipe = case.recipe()
    numbers = {name: value for name, value in case.group().items() if name in recipe.defaults()}
    return shardopt.ShardedOptimizer([{"params": [p], **numbers}], recipe, **options)


def stepped(case: Case, gradient: torch.dtype, fused: bool, steps: int = 5, **options: Any) -> dict[str, Tensor]:
    """Parameter and state after some steps; with fused=True nothing but kernels may have run."""
    opt = optimizer_of(case, DTYPES[case.dtype], gradient, fused=fused, **options)
    (p,) = opt.param_groups[0]["params"]
    for g in gradients(case.shape, steps):
        p.grad = g.to(gradient, copy=True)
        opt.step()
        assert torch.equal(p.grad, g.to(gradient)), "gradients are read only"
    if fused:
        assert (opt.native.stepped, opt.native.left, len(opt.native.ran)) == (1, 0, 1)
    return {"p": p.detach(), **opt.state[p]}


def differences(reference: dict[str, Tensor], kernel: dict[str, Tensor]) -> list[Difference]:
    """Every tensor that is not the same bit by bit; a NaN equals a NaN."""
    assert reference.keys() == kernel.keys()
    found = []
    for name, x in reference.items():
        y = kernel[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        x, y = x.double(), y.double()
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        if unequal.any():
            found.append(Difference(name, int(unequal.sum()), float((x - y)[unequal].abs().max())))
    return found
