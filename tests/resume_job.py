"""A job to be stopped and resumed: models, meshes, and gradients that are functions of step and parameter name."""

import zlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import shardopt
from shardopt import Recipe, ShardedOptimizer
from shardopt.codecs import view_shape
from shardopt.rules import AdamW, Rule
from tests.table import STATES

LAYOUTS = ("alone", "fsdp", "hsdp", "tp_fsdp")


class Odd(nn.Module):
    """Shapes that hurt: rows that no rank count divides, a convolution, vectors, fewer rows than ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.tall = nn.Parameter(torch.empty(70, 130))
        self.wide = nn.Parameter(torch.empty(3, 2100))
        self.kernel = nn.Parameter(torch.empty(17, 32, 3, 3))
        self.vector = nn.Parameter(torch.empty(7))
        self.up = nn.Linear(64, 96)


class Even(nn.Module):
    """Linear layers that tensor parallelism and FSDP2 may both cut."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(64, 96)
        self.down = nn.Linear(96, 64)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x))


def numbers(name: str, shape: tuple[int, ...], step: int) -> Tensor:
    """Full fp32 content that depends on name and step alone; sizes vary over rows, and some elements are zero."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {step}".encode()))
    x = torch.randn(shape, generator=generator)
    if x.ndim > 1:
        x *= torch.logspace(-3, 1, shape[0]).view(-1, *[1] * (x.ndim - 1))
    return torch.where(torch.rand(shape, generator=generator) < 0.05, 0.0, x)


def build(layout: str, world_size: int = 1, *, model: type[nn.Module] | None = None, dtype: torch.dtype) -> nn.Module:
    """The model, its weights the same for every layout. hsdp and tp_fsdp: two times world_size / 2."""
    module: Any = (model or (Even if layout == "tp_fsdp" else Odd))().to(dtype)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.copy_(0.1 * numbers(name, tuple(p.shape), -1))
    if layout == "fsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (world_size,)))
    elif layout == "hsdp":
        fully_shard(module, mesh=init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("replica", "shard")))
    elif layout == "tp_fsdp":
        mesh = init_device_mesh("cpu", (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(module, mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
        fully_shard(module, mesh=mesh["dp"])
    return module


def optimizer(model: nn.Module, state: str, rule: Rule | None = None, rounding: str = "stochastic") -> ShardedOptimizer:
    """With the codecs of a row of the table; what a rule is not defined on goes to AdamW."""
    adamw = AdamW(lr=1e-2, betas=(0.83, 0.957))
    rule = rule or adamw
    formats = dict(zip(("signed", "non_negative"), STATES[state]))
    every = list(model.parameters())
    unfit = [p for p in every if rule.unfit(view_shape(tuple(p.shape)))]
    groups: list[dict[str, Any]] = [{"params": [p for p in every if all(p is not q for q in unfit)]}]
    groups += [{"params": unfit, "recipe": Recipe(adamw, formats, ("decay",), rounding)}] if unfit else []
    return ShardedOptimizer(groups, Recipe(rule, formats, ("decay",), rounding), weight_decay=0.1)


def cut(full: Tensor, like: Tensor) -> Tensor:
    """The piece of a full tensor that this rank has of a parameter, by torch.chunk: the innermost axis cuts first."""
    if not isinstance(like, DTensor):
        return full
    where, local = like.device_mesh.get_coordinate(), full
    for axis in reversed(range(like.device_mesh.ndim)):
        placement = like.placements[axis]
        if not placement.is_replicate():
            chunks = local.chunk(like.device_mesh.size(axis), placement.dim)
            empty = local.narrow(placement.dim, 0, 0)
            local = chunks[where[axis]] if where[axis] < len(chunks) else empty
    shape, stride = full.shape, full.stride()
    return DTensor.from_local(
        local.contiguous(), like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride
    )


def train(model: nn.Module, opt: torch.optim.Optimizer, first: int, last: int) -> None:
    """Steps first + 1 to last; the vector has no gradient in odd steps."""
    for step in range(first + 1, last + 1):
        for name, p in model.named_parameters():
            full = numbers(name, tuple(p.shape), step).to(p.dtype)
            p.grad = None if name == "vector" and step % 2 else cut(full, p)
        opt.step()


def full(tensor: Any) -> Tensor:
    whole = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return whole.detach().clone()


def contents(model: nn.Module, opt: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Every parameter and every stored part, whole, by name."""
    found = {}
    for name, p in model.named_parameters():
        found[name] = full(p)
        found.update({f"{name}: {part}": full(value) for part, value in opt.state[p].items()})
    return found


def check_equal(got: dict[str, Tensor], want: dict[str, Tensor], asks: bool = False) -> None:
    """Bitwise, or where something is asked: parameters to 1e-6 of the norm, codes but for 1 in 10^5 by one."""
    assert got.keys() == want.keys()
    for name, x in want.items():
        y = got[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape), name
        if not asks:
            assert torch.equal(x, y), f"{name}: {(x != y).sum()} of {x.numel()} differ"
        elif x.is_floating_point():
            far = (x.double() - y.double()).norm() / x.double().norm().clamp_min(1e-30)
            assert far < (2e-3 if x.dtype == torch.bfloat16 else 2e-6), f"{name}: {far}"
        else:
            assert (x != y).sum() <= 1 + x.numel() // 100000, name


def uninterrupted(
    state: str, dtype: torch.dtype, last: int, layout: str = "alone", **options: Any
) -> dict[str, Tensor]:
    """What an unsharded job that was never stopped has after `last` steps."""
    model = build("alone", dtype=dtype, model=Even if layout == "tp_fsdp" else None)
    opt = optimizer(model, state, **options)
    train(model, opt, 0, last)
    return contents(model, opt)


def run_and_save(path: Any, layout: str, ranks: int, state: str, dtype: torch.dtype, at: int, **options: Any) -> None:
    """A job that trains `at` steps, saves, and goes on as if nothing were: it is killed later."""
    model = build(layout, ranks, dtype=dtype, model=options.pop("model", None))
    opt = optimizer(model, state, **options)
    train(model, opt, 0, at)
    shardopt.save_checkpoint(path, model, opt, step=at, extra={"ranks": ranks})


def resume(path: Any, layout: str, ranks: int, state: str, dtype: torch.dtype, last: int, **options: Any) -> Any:
    """A new job that loads and trains on to `last`; its contents."""
    model = build(layout, ranks, dtype=dtype, model=options.pop("model", None))
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    opt = optimizer(model, state, **options)
    extra = shardopt.load_checkpoint(path, model, opt)
    assert extra is not None
    train(model, opt, extra["step"], last)
    return contents(model, opt)
