"""The local gradient of a parameter, or a ValueError that says why an optimizer cannot step on it."""

import torch
from torch import Tensor
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from shardopt.dtensor.layout import Layout, describe, local_of


def local_gradient(p: Tensor, layout: Layout) -> Tensor:
    """p.grad's local tensor, of the local parameter's shape; p.grad itself is never written."""
    grad, name = p.grad, layout.name or "a parameter"
    assert grad is not None
    if grad.layout is not torch.strided:
        raise ValueError(
            f"the gradient of {name} is sparse ({grad.layout}); use nn.Embedding(sparse=False), or densify it with "
            "p.grad = p.grad.to_dense()"
        )
    if grad.is_complex():
        raise ValueError(f"the gradient of {name} is complex ({grad.dtype}); split it into real parameters")
    if isinstance(grad, DTensor) != isinstance(p, DTensor):
        raise ValueError(
            f"the gradient of {name} is a {type(grad).__name__}, the parameter a {type(p).__name__}; both must be "
            "DTensors of one mesh or both plain"
        )
    if isinstance(grad, DTensor) and isinstance(p, DTensor) and grad.placements != p.placements:
        partial = any(placement.is_partial() for placement in grad.placements)
        remedy = "reduce it" if partial else "redistribute it"
        raise ValueError(
            f"the gradient of {describe(layout)} has placements {grad.placements}; {remedy} first: "
            "p.grad = p.grad.redistribute(placements=p.placements)"
        )
    local = local_of(grad)
    local = local.wait() if isinstance(local, AsyncCollectiveTensor) else local  # kernels read memory
    if tuple(local.shape) != tuple(local_of(p).shape):
        raise ValueError(f"the gradient of {name} has shape {tuple(grad.shape)}, the parameter {tuple(p.shape)}")
    return local
