"""Where the model lives: process group, device mesh, tensor-parallel plan, FSDP2 on every block and on the root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from .config import Config
from .model import Decoder
from .weights import init_weights

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class Place:
    """This process among the others; data goes to (rank, world) of the data-parallel ranks."""

    device: torch.device
    mesh: DeviceMesh
    rank: int
    world: int
    tp: int

    @property
    def axes(self) -> str:
        return " x ".join(f"{name} {size}" for name, size in zip(self.mesh.mesh_dim_names or (), self.mesh.shape))

    @property
    def first(self) -> bool:
        return dist.get_rank() == 0


def start(config: Config) -> Place:
    """Join the processes that torchrun started, or be the only one."""
    kind = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}" if kind == "cuda" else kind)
    if kind == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--device is cuda, but torch sees no GPU; use --device cpu or a torch made for this GPU")
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    return lay(config, device)


def lay(config: Config, device: torch.device) -> Place:
    """The mesh over all ranks; axes of size 1 are left out, but for "shard"."""
    shard, rest = divmod(dist.get_world_size(), config.replicate * config.tp)
    if rest or not shard:
        raise ValueError(
            f"{dist.get_world_size()} ranks are no multiple of replicate {config.replicate} x tp {config.tp}"
        )
    sizes = {"replicate": config.replicate, "shard": shard, "tp": config.tp}
    axes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    return Place(device, mesh, dist.get_rank() // config.tp, config.replicate * shard, config.tp)


def stop() -> None:
    dist.barrier()
    dist.destroy_process_group()


def tensor_parallel_plan(config: Config) -> dict[str, ParallelStyle]:
    plan: dict[str, ParallelStyle] = {f"blocks.*.attention.w{x}": ColwiseParallel() for x in "qkv"}
    plan |= {"blocks.*.attention.wo": RowwiseParallel(), "blocks.*.mlp.w2": RowwiseParallel()}
    plan |= {"blocks.*.mlp.w1": ColwiseParallel(), "blocks.*.mlp.w3": ColwiseParallel()}
    if not config.tied:  # a plan for either module would untie them
        plan["embed"] = RowwiseParallel(input_layouts=Replicate())
        plan["head"] = ColwiseParallel(output_layouts=Replicate())
    return plan


def check_tensor_parallel(model: Any, config: Config) -> None:
    split = {
        "heads": config.heads,
        "kv_heads": config.kv_heads or config.heads,
        "hidden": model.blocks[0].mlp.w1.out_features,
        "vocab": config.vocab,
    }
    for name, size in split.items():
        if size % config.tp:
            raise ValueError(f"{name} {size} is no multiple of tp {config.tp}")


def build_model(config: Config, place: Place) -> Decoder:
    """Meta, tensor parallel, sharded, materialised, initialised: no rank ever holds the whole model."""
    with torch.device("meta"):
        model = Decoder(config).to(DTYPES[config.param_dtype])
    if config.tp > 1:
        check_tensor_parallel(model, config)
        parallelize_module(model, place.mesh["tp"], tensor_parallel_plan(config))
    data_axes = tuple(name for name in place.mesh.mesh_dim_names or () if name != "tp")
    data_mesh = place.mesh[data_axes] if config.tp > 1 else place.mesh
    compute = config.compute_dtype if config.compute_dtype != "auto" else config.param_dtype
    # Inputs are not cast: the embedding gives the compute type already, and the rotary angles must stay fp32.
    policy = MixedPrecisionPolicy(DTYPES[compute], DTYPES[config.reduce_dtype], cast_forward_inputs=False)
    for block in model.blocks:
        fully_shard(block, mesh=data_mesh, mp_policy=policy)
    fully_shard(model, mesh=data_mesh, mp_policy=policy)
    model.to_empty(device=place.device)
    init_weights(model, config)
    return model
