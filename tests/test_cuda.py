"""What only a GPU can show: the same recipes there, no host synchronisation, FSDP2 with offloaded parameters."""

import json
import os
from contextlib import contextmanager
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn

import shardopt
from shardopt.codecs.sendable import wire_codec
from shardopt.dtensor.wire import stack
from shardopt.kernels.wire import Coder
from tests import test_kernel_straddling as straddling
from tests.table import DTYPES, RULES, STATES, recipe

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def gradients(step: int, shapes: list[tuple[int, ...]]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(shape, generator=generator) * 1e-3 for shape in shapes]


def trained(
    rule: str,
    state: str,
    dtype: torch.dtype,
    device: str,
    steps: int = 5,
    fused: bool | None = None,
    addons: str = "decay",
    source: str = "fresh",
    shapes: tuple[tuple[int, ...], ...] = ((70, 130), (12, 512), (7,)),
) -> list[torch.Tensor]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape).to(dtype).to(device)) for shape in shapes]
    chosen = recipe(rule, state, addons, "stochastic", source)
    numbers = {"weight_decay": 0.1} if "weight_decay" in chosen.defaults() else {}
    opt = shardopt.ShardedOptimizer(params, chosen, fused=fused, **numbers)
    for step in range(steps):
        for p, g in zip(params, gradients(step, shapes)):
            p.grad = g.to(dtype).to(device)
        opt.step()
    assert fused is not True or (opt.native.stepped, opt.native.left) == (len(params), 0)
    return [p.detach().cpu().float() for p in params]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("state", STATES)
def test_same_as_on_the_cpu(rule, state):
    """Kills: a formula that reads another device's tensor, or noise that depends on the device."""
    for name, dtype in DTYPES.items():
        ulp = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 2e-3}[name]
        for a, b in zip(trained(rule, state, dtype, "cuda"), trained(rule, state, dtype, "cpu")):
            assert (a - b).norm() <= ulp * b.norm()


@pytest.mark.parametrize("rule", ["adamw", "adamw.nesterov", "lion", "sgd.momentum", "rmsprop"])
@pytest.mark.parametrize("state", STATES)
def test_kernels_equal_the_reference(rule, state):
    """Kills: whatever the emulated team cannot show: launches, streams, addresses, the GPU's own arithmetic."""
    for dtype in DTYPES.values():
        runs = [trained(rule, state, dtype, "cuda", fused=fused) for fused in (True, False)]
        for a, b in zip(*runs):
            assert (a != b).double().mean() < 1e-3 and (a - b).norm() <= 1e-3 * b.norm()


# of one piece and of several, a stack, a vector, rows wider than a piece
ASKING_SHAPES = ((70, 130), (1100, 1300), (4, 264, 48), (40000,), (5, 9000))


ASKING = [
    ("adafactor.update", "none", "fresh"), ("adafactor.raw", "cautious", "fresh"), ("adafactor.hf", "all", "stored"),
    ("adafactor.fixed", "rms_clip", "fresh"), ("adamw", "all", "fresh"), ("adamw.nesterov", "cautious", "stored"),
    ("rmsprop.centered", "centralized", "stored"), ("lion", "orthograd", "fresh"),
]  # fmt: skip


@pytest.mark.parametrize("rule, addons, source", ASKING)
def test_what_asks_equals_the_reference(rule, addons, source):
    """In passes. Kills: whatever the emulated team cannot show: barriers, shared memory, shuffles of float64."""
    for state, dtype in (("sqrt8+factored", torch.bfloat16), ("int8+log8", torch.float32)):
        given = dict(steps=3, addons=addons, source=source, shapes=ASKING_SHAPES)
        runs = [trained(rule, state, dtype, "cuda", fused=fused, **given) for fused in (True, False)]
        for a, b in zip(*runs):  # a mean that differs by an ulp moves every fp32 element, and few of bf16
            assert (a - b).norm() <= 1e-5 * b.norm() or (a != b).double().mean() < 1e-3
        again = trained(rule, state, dtype, "cuda", fused=True, **given)
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again))


@pytest.mark.parametrize("place, state", [("3", "int8"), ("strips", "sizes"), ("2 x 2", "half")])
def test_blocks_on_several_ranks(place, state):
    """Ranks as threads on one GPU. Kills: CTAs that raise one number at once and lose one, numbers of blocks that
    change while they are read."""
    options = {"shapes": straddling.shapes_of(state), "device": "cuda"}
    runs = [straddling.run(place, partial(straddling.adamw(state), fused=f), **options) for f in (False, True)]
    for (others, counts), (mine, asked) in zip(*runs):
        assert asked == counts
        for one, other in zip(others, mine):
            for name, x in one.items():
                x, y = x.double(), other[name].double()
                assert (x != y).double().mean() < 1e-3 and (x - y).norm() <= 1e-3 * x.norm(), name


@pytest.mark.parametrize("spec", ["int8(block=128)", "int4(block=64)", "bf16", "fp8", "dyn8(block=64)"])
def test_messages_have_the_bits_of_a_cpu(spec):
    """Kills: what the emulated warp cannot show of `csrc/wire_warp.h`: launches, shuffles, division on a GPU."""
    codec, x = wire_codec(spec), torch.randn(3, 70, 1040) * torch.exp2(torch.arange(70.0) - 40)[:, None]
    geo = stack(*x.shape)
    expected = Coder().encode(codec, x, geo)
    found = Coder(gpus=True).encode(codec, x.cuda(), geo)
    for name, part in expected.items():
        assert torch.equal(found[name].cpu().view(torch.uint8), part.view(torch.uint8))
    assert torch.equal(Coder(gpus=True).decode(codec, found, geo).cpu(), Coder().decode(codec, expected, geo))


@pytest.mark.parametrize("name, addons", [("AdamW", []), ("AdamW", ["cautious", "orthograd"]), ("Adafactor", [])])
def test_kernels_in_a_cuda_graph(name, addons):
    """Replays step like eager steps. Kills: a rate, a step count or an answer frozen into the graph, answers or sums
    that another tensor's memory was given to."""

    def run(captured: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(64, 256, device="cuda")) for _ in range(3)]
        lr = torch.tensor(1e-2, device="cuda")
        opt = getattr(shardopt, name)(params, lr=lr, addons=addons, fused=True)
        for p in params:
            p.grad = torch.randn_like(p)
        opt.step()
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                opt.step()
        for step in range(4):
            lr.fill_(1e-2 / (step + 1))
            graph.replay() if captured else opt.step()
        return [p.detach() for p in params]

    assert all(torch.equal(a, b) for a, b in zip(run(True), run(False)))


@pytest.mark.parametrize("name", ["Muon", "NorMuon", "AdaMuon"])
def test_muon_iterates_in_half_precision(name):
    """fp16 on the GPU beside fp32 on the CPU, without waiting for the device. Kills: an iteration in another format,
    a wire whose codes depend on the device."""

    def run(device: str) -> torch.Tensor:
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(96, 256).to(device))
        opt = getattr(shardopt, name)([p], lr=0.05, weight_decay=0.0)
        for step in range(4):
            p.grad = gradients(step, [(96, 256)])[0].to(device)
            if step == 3 and device == "cuda":
                with no_synchronisation():
                    opt.step()
            else:
                opt.step()
        return p.detach().cpu()

    torch.manual_seed(0)
    start = torch.randn(96, 256)
    a, b = run("cuda"), run("cpu")
    assert (a - b).norm() <= 0.03 * (b - start).norm()


@contextmanager
def no_synchronisation():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
@pytest.mark.parametrize("rule", ["adamw", "lion", "sgd.momentum", "adafactor"])
@pytest.mark.parametrize("fused", [None, True])
def test_no_host_synchronisation(rule, nonfinite, fused):
    """Kills: an .item() or an `if` on a device value in the step, an upload of what kernels are told."""
    params = [nn.Parameter(torch.randn(64, 256, device="cuda")) for _ in range(3)]
    opt = shardopt.ShardedOptimizer(params, recipe(rule, "int8+log8"), nonfinite=nonfinite, fused=fused)
    for step in range(4):
        for p in params:
            p.grad = torch.randn_like(p)
        if step == 0:
            opt.step()
            continue
        with no_synchronisation():
            opt.step()
    if nonfinite == "skip":
        before = [p.detach().clone() for p in params]
        params[0].grad[0, 0] = float("nan")
        with no_synchronisation():
            opt.step()
        assert opt.skipped_steps == 1 and all(torch.equal(p, q) for p, q in zip(params, before))


def test_offloaded_fsdp2_parameters(tmp_path):
    """Kills: state that is moved to the mesh's device, and asks that travel on the CPU of an nccl mesh."""
    from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard

    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = nn.Sequential(nn.Linear(128, 256, bias=False), nn.Linear(256, 128, bias=False)).cuda()
        fully_shard(model, offload_policy=CPUOffloadPolicy())
        opt = shardopt.Adafactor(model.parameters())
        for _ in range(3):
            model(torch.randn(4, 128, device="cuda")).square().mean().backward()
            opt.step()
        for state in opt.state.values():
            assert all(getattr(part, "_local_tensor", part).device.type == "cpu" for part in state.values())
    finally:
        dist.destroy_process_group()


def test_report():
    """Where $OUT is set, leaves what ran as JSON."""
    if out := os.environ.get("OUT"):
        device = torch.cuda.get_device_name()
        with open(f"{out}/cuda_tests.json", "w") as file:
            json.dump({"device": device, "torch": torch.__version__}, file)
