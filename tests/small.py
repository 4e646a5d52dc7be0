"""Small models of every kind of tensor, their gradients, and what it means that two of them are equal."""

import torch

from tests.table import weights
from tests.virtual import bits

SHAPES = ((7, 15), (64, 96), (7,), ())


def params(shapes=SHAPES, dtype=torch.float32):
    return [torch.nn.Parameter(weights(shape, dtype, seed=i)) for i, shape in enumerate(shapes)]


def give(ps, step=0):
    """Every parameter a gradient, the same for the same step."""
    draw = torch.Generator().manual_seed(100 + step)
    for p in ps:
        p.grad = torch.randn(p.shape, generator=draw).to(p.dtype)


def train(optimizer, ps, steps, first=0):
    for i in range(first, first + steps):
        give(ps, i)
        optimizer.step()


def close(ps, qs, tolerance=1e-6):
    return all((p - q).norm() <= tolerance * q.norm() for p, q in zip(ps, qs))


def same(ps, qs):
    return all(bits(p.detach()).equal(bits(q.detach())) for p, q in zip(ps, qs))
