"""Initial weights are a function of seed and parameter name alone, so that they are the same on every mesh."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .config import Config


def name_seed(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def initial(name: str, shape: torch.Size, config: Config) -> Tensor:
    """The whole parameter `name` in fp32 on the CPU, whatever the mesh."""
    if len(shape) == 1:
        return torch.ones(shape)
    if config.zero_init and name.endswith(("attention.wo.weight", "mlp.w2.weight")):
        return torch.zeros(shape)
    if name == "head.weight" and config.zero_head:
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(name_seed(config.seed, name))
    # A row of the embedding is one token's vector; tied, it is the head's row as well and must give logits of size 1.
    std = 1.0 if name == "embed.weight" and not config.tied else shape[1] ** -0.5
    return torch.randn(shape, generator=generator) * std


@torch.no_grad()
def copy_shard(parameter: Tensor, full: Tensor) -> None:
    """Write this rank's piece of `full` into `parameter`, plain or DTensor with any placements."""
    if not isinstance(parameter, DTensor):
        parameter.copy_(full)
        return
    # What checkpoints ask too: it knows strided shards, which `distribute_tensor` does not.
    sharded: Any = parameter
    (chunk,) = sharded.__create_chunk_list__()
    local = parameter.to_local()
    if local.shape != chunk.sizes:
        raise ValueError(
            f"the local shard of shape {tuple(local.shape)} is not the {tuple(chunk.sizes)} of {parameter.placements}; "
            "choose tp and rank count so that they divide the parameter's rows"
        )
    local.copy_(full[tuple(slice(o, o + n) for o, n in zip(chunk.offsets, chunk.sizes))])


def init_weights(model: nn.Module, config: Config) -> None:
    """Fill `model` parameter by parameter: at no time is more than one of them whole in memory."""
    for name, parameter in model.named_parameters():
        copy_shard(parameter, initial(name, parameter.shape, config))
