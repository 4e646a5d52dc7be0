"""What the codec tests share: values, noise, drivers of one and of several virtual ranks."""

import math
from collections import defaultdict

import pytest
import torch

from shardopt.asks import Max, Mean, as_tuple, is_group
from shardopt.codecs import CODECS
from shardopt.codecs.geometry import Geometry

SEED = 20240607
BLOCKED = [name for name in CODECS if name not in ("fp32", "bf16", "fp16", "factored")]
PACKED = ("int4", "dyn4", "log4")
ELEMENTWISE = [name for name in CODECS if name != "factored"]
SLOTS = [(name, True) for name in ELEMENTWISE if CODECS[name].signed]
SLOTS += [(name, False) for name in ELEMENTWISE if CODECS[name].non_negative]
NON_NEGATIVE = [name for name, signed in SLOTS if not signed]


def make(name, signed, block=None, rounding=None):
    """The codec as a slot of this kind gets it."""
    options = {}
    if block and name in BLOCKED:
        options["block"] = block
    if rounding and "rounding" in CODECS[name].__dataclass_fields__:
        options["rounding"] = rounding
    return CODECS[name](**options).for_slot(signed)


def random_noise(shape, seed=SEED):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-(2**31), 2**31, shape, generator=generator).to(torch.int32)


def values(shape, signed, seed=SEED, octaves=6.0, scale=1e-4):
    """Normal numbers times a log-normal spread, or their squares; a few exact zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator) * torch.exp2(octaves / 4 * torch.randn(shape, generator=generator))
    x = torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x * scale)
    return x if signed else x * x


def drive(generator):
    """Result of a generator that asks nothing."""
    with pytest.raises(StopIteration) as stop:
        generator.send(None)
    return stop.value.value


def drive_together(generators, geos, where):
    """Results of the generators of virtual ranks at `where` = (row piece, column piece), answered as one parameter."""
    replies, results = [None] * len(generators), []
    while True:
        asked = []
        for generator, reply in zip(generators, replies):
            try:
                asked.append(generator.send(reply))
            except StopIteration as stop:
                results.append(stop.value)
        if not asked:
            return results
        assert len(asked) == len(generators), "every rank must ask as often as every other"
        columns = [answers(list(same), geos[0].view, where) for same in zip(*(as_tuple(a) for a in asked))]
        replies = [group if is_group(asked[0]) else group[0] for group in zip(*columns)]


def answers(asks, view, where):
    """What every rank hears: means in float64, maxima as they are."""
    assert len({type(ask) for ask in asks}) == 1
    over = asks[0].over if asks[0].over is not None else asks[0].dim
    over = {over} if isinstance(over, int) else set(over)
    groups = defaultdict(list)
    for rank, (i, j) in enumerate(where):
        groups[None if -2 in over else i, None if -1 in over else j].append(rank)
    heard = [None] * len(asks)
    for ranks in groups.values():
        if isinstance(asks[0], Max):
            total = torch.stack([asks[r].x for r in ranks]).amax(0)
        else:
            assert isinstance(asks[0], Mean)
            total = sum(asks[r].x.double().sum(asks[r].dim) for r in ranks)
            total = total / math.prod(view[dim] for dim in over)
            total = total if total.ndim == 0 else total.float()
        for r in ranks:
            heard[r] = total.clone()
    return heard


def whole(x, c, noise=None):
    """Parts of an uncut x."""
    return drive(c.encode(x, Geometry.whole(x.shape), lambda: random_noise(x.shape) if noise is None else noise))


def decoded(parts, c, shape):
    return c.decode(parts, Geometry.whole(shape))


def bits(x):
    """A tensor that compares bitwise."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[x.element_size()])


def assert_same(a, b):
    assert a.keys() == b.keys()
    for suffix in a:
        assert a[suffix].dtype == b[suffix].dtype
        assert torch.equal(bits(a[suffix]), bits(b[suffix])), suffix
