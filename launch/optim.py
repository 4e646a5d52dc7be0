"""Builds the optimizer that the options name, its parameter groups, and its learning-rate schedule."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm
from torch.optim.lr_scheduler import LambdaLR

import shardopt
from shardopt.spelling import near

from .config import Config

FROM_CONFIG = ("lr", "weight_decay", "betas")


def parameter_groups(model: nn.Module, config: Config) -> list[dict[str, Any]]:
    """Matrices inside blocks; embedding and head, which need a larger rate; vectors. Only the first decay."""
    ends: list[Tensor] = []
    vectors: list[Tensor] = []
    matrices: list[Tensor] = []
    for name, parameter in model.named_parameters():
        (ends if name.startswith(("embed.", "head.")) else vectors if parameter.ndim < 2 else matrices).append(
            parameter
        )
    return [
        {"params": matrices, "lr": config.lr, "weight_decay": config.weight_decay},
        {"params": ends, "lr": config.embed_lr or config.lr, "weight_decay": 0.0},
        {"params": vectors, "lr": config.lr, "weight_decay": 0.0},
    ]


def find(name: str) -> Any:
    """shardopt's optimizer `name`, spelled as the user likes: adamw, AdamW, schedule_free."""
    wanted = name.replace("_", "").replace("-", "").lower()
    for public in dir(shardopt):
        found = getattr(shardopt, public)
        if public.lower() == wanted and isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
            return found
    every = [x for x in dir(shardopt) if isinstance(getattr(shardopt, x), type)]
    names = [x for x in every if issubclass(getattr(shardopt, x), torch.optim.Optimizer) and x != "ShardedOptimizer"]
    has = f"it has {', '.join(names)}, torch-adamw is torch's"
    raise ValueError(f"shardopt has no optimizer {name!r}; {has}{near(name, names)}")


def build(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    groups = parameter_groups(model, config)
    options: dict[str, Any] = {"lr": config.lr} | further(config.optimizer_args)
    if config.betas:
        options["betas"] = tuple(float(beta) for beta in config.betas.split(","))
    if config.optimizer == "torch-adamw":  # the peer to compare with: no codecs, no add-ons, no skipping
        return torch.optim.AdamW(groups, **options)
    if config.rounding:
        options["rounding"] = config.rounding
    if config.addons:
        options["addons"] = [name.strip() for name in config.addons.split(",")]
    if config.state:
        options["state"] = config.state
    found = find(config.optimizer)
    if issubclass(found, shardopt.Muon):
        return routed(model, config, options)
    return found(groups, nonfinite="skip", seed=config.seed, **options)


def further(text: str) -> dict[str, Any]:
    """The options that are given as JSON."""
    try:
        found = json.loads(text or "{}")
    except json.JSONDecodeError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(f"--optimizer_args is {text!r}; give a JSON object such as '{{\"momentum\": 0.9}}'")
    return found


def routed(model: nn.Module, config: Config, options: dict[str, Any]) -> torch.optim.Optimizer:
    """Muon and its kin for matrices; embedding, head and vectors to AdamW in the same optimizer, at their own rates."""
    for_all = {f"aux_{name}": options[name] for name in ("rounding",) if name in options}
    for_all |= {"aux_betas": options.pop("betas")} if "betas" in options else {}
    ends = config.embed_lr or config.lr
    decay = config.weight_decay
    name = config.optimizer.replace("_", "").replace("-", "").lower()
    shared: dict[str, Any] = {"nonfinite": "skip", "seed": config.seed, "embedding_lr": ends}
    shared |= {} if config.tied else {"head_lr": ends}
    return shardopt.build_optimizer(model, name, weight_decay=decay, **shared, **for_all, **options)


def factor(step: int, config: Config) -> float:
    """What the learning rate of update `step` (from 0) is multiplied with."""
    if step < config.warmup:
        return (step + 1) / config.warmup
    begin = max(config.warmup, int(config.decay_from * config.steps))
    if config.schedule == "constant" or step < begin:
        return 1.0
    done = min((step - begin) / max(config.steps - begin, 1), 1.0)
    left = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return config.min_lr + (1 - config.min_lr) * left


def scheduler(optimizer: torch.optim.Optimizer, config: Config, step: int, given: list[dict[str, Any]]) -> LambdaLR:
    """The schedule as it stands before update `step`: derived from the step, never loaded, so options may change."""
    for group, own in zip(optimizer.param_groups, given):
        group.update(own)
        group["initial_lr"] = own["lr"]
    return LambdaLR(optimizer, lambda k: factor(k, config), last_epoch=step - 1)


def given(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The hyper-parameters that the options set, to be put back after a checkpoint brought its own."""
    return [{key: group[key] for key in FROM_CONFIG if key in group} for group in optimizer.param_groups]


def clip(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Clip to a global norm and return it; tensor-parallel and other parameters live on different meshes."""
    meshes: dict[Any, list[Tensor]] = {}
    with_grad = [p for p in parameters if p.grad is not None]
    for p in with_grad:
        meshes.setdefault(p.device_mesh if isinstance(p, DTensor) else None, []).append(p)
    norms = [get_total_norm([p.grad for p in each if p.grad is not None]) for each in meshes.values()]
    norm = torch.stack([n.full_tensor() if isinstance(n, DTensor) else n for n in norms]).float().norm()
    if max_norm > 0:
        for each in meshes.values():
            clip_grads_with_norm_(each, max_norm, norm)
    return norm
