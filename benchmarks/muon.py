"""Real Muon steps: time, bytes and messages, by wire and mode, beside torch.optim.Muon where one rank has everything.

    python -m benchmarks.muon                          one rank: ours, torch's, and others' that are installed
    python -m benchmarks.muon --ranks 2                FSDP2 on gloo (nccl with GPUs): every wire, every mode
    python -m benchmarks.muon --size 1b                the matrices of a model of a billion parameters (a GPU's work)

Contenders take turns, step by step; figures are medians. `rate`: of the orthogonalizations alone, as a share of the
matrix rate that a product of 4096 x 4096 (1024 on a CPU) reaches in the same run.
"""

import argparse
import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

import shardopt
from shardopt.polar import orthogonalizer

RESULTS = Path(__file__).parent / "results"
SIZES = {  # width, hidden, layers: seven matrices a layer
    "small": (256, 704, 6),
    "100m": (768, 2048, 12),
    "1b": (2048, 5504, 20),
}
IN_BF16 = "newton_schulz(dtype='bf16')"
WIRES = ("exact", "bf16", "int8", "int8+int4")


def shapes(size: str) -> list[tuple[int, int]]:
    dim, hidden, layers = SIZES[size]
    return ([(dim, dim)] * 4 + [(hidden, dim)] * 2 + [(dim, hidden)]) * layers


def contenders(ranks: int) -> dict[str, Callable[[list[nn.Parameter]], Any]]:
    """torch's, and those of packages that are installed; ours, on several ranks by wire and mode."""
    made: dict[str, Callable[[list[nn.Parameter]], Any]] = {
        "torch.optim.Muon": lambda ps: torch.optim.Muon(ps),
        "muon-fsdp2": muon_fsdp2,
    }
    if ranks == 1:
        for name in ("quintic", "polar_express", "gram"):
            made[f"shardopt {name}"] = ours(orthogonalizer=name)
        made["shardopt quintic, bf16"] = ours(orthogonalizer=IN_BF16)
        return made
    for wire in WIRES:
        made[f"shardopt {wire}"] = ours(wire=wire)
    made["shardopt int8, bf16"] = ours(orthogonalizer=IN_BF16)  # as the others iterate
    made["shardopt local"] = ours(mode="local")
    made["shardopt auto"] = ours(mode="auto", orthogonalizer="minimax")
    return made


def ours(**options: Any) -> Callable[[list[nn.Parameter]], Any]:
    """With kernels, which GPUs run only where they are asked for."""
    return lambda params: shardopt.Muon(params, fused=True, **options)


def muon_fsdp2(params: list[nn.Parameter]) -> Any:
    """ImportError where it is not installed."""
    from muon_fsdp2 import Muon

    return Muon([{"params": params, "lr": 1e-3, "use_muon": True}])


def clocked(call: Callable[[], Any], device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
    began = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def matrix_rate(device: str, repeats: int) -> float:
    """FLOP a second of a large product in the type that orthogonalizers use there."""
    n, dtype = (4096, torch.float16) if device == "cuda" else (1024, torch.float32)
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    times = [clocked(lambda: a @ b, device) for _ in range(repeats + 3)][3:]
    return 2 * n**3 / statistics.median(times)


def orthogonal_rate(name: str, size: str, device: str, repeats: int) -> float:
    """FLOP a second of one layer's matrices, counted by the orthogonalizer itself."""
    work, layer = orthogonalizer(name), shapes(size)[:7]
    stacks = [torch.randn(layer.count(shape), *shape, device=device) for shape in dict.fromkeys(layer)]
    flops = sum(work.flops(*shape) for shape in layer)
    times = [clocked(lambda: [work(x) for x in stacks], device) for _ in range(repeats + 2)][2:]
    return flops / statistics.median(times)


def job(rank: int, options: argparse.Namespace, out: Any) -> None:
    """What one rank does; the first puts the rows."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.set_num_threads(max(1, options.threads // options.ranks))
    mesh = None
    if options.ranks > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(options.ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT="29584")
        if device == "cuda":
            torch.cuda.set_device(rank)
        dist.init_process_group("nccl" if device == "cuda" else "gloo")
        mesh = dist.device_mesh.init_device_mesh(device, (options.ranks,))
    running: dict[str, tuple[Any, list[float]]] = {}
    for who, make in contenders(options.ranks).items():
        if options.only and who not in options.only:
            continue
        try:
            opt = make(parameters(shapes(options.size), device, mesh))
            opt.step()
        except Exception as error:  # not installed, or refuses this mesh
            if rank == 0:
                print(f"{who} left out: {str(error).splitlines()[0][:100]}", flush=True)
            continue
        running[who] = (opt, [])
    counted = {who: dict(vars(opt.answers)) if hasattr(opt, "answers") else {} for who, (opt, _) in running.items()}
    for _ in range(options.repeats):
        for opt, times in running.values():
            times.append(clocked(opt.step, device))
    if rank == 0:
        out.put([row(who, opt, times, counted[who], options) for who, (opt, times) in running.items()])
    if mesh is not None:
        dist.destroy_process_group()


def parameters(wanted: list[tuple[int, int]], device: str, mesh: Any) -> list[nn.Parameter]:
    made = []
    for shape in wanted:
        p, g = torch.randn(shape, device=device) * 0.02, torch.randn(shape, device=device) * 1e-3
        if mesh is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            p, g = (distribute_tensor(t, mesh, [Shard(0)]) for t in (p, g))
        made.append(nn.Parameter(p))
        made[-1].grad = g
    return made


def row(who: str, opt: Any, times: list[float], before: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    """Medians, and what was sent in a step."""
    found = {"who": who, "size": options.size, "ranks": options.ranks, "ms": round(statistics.median(times) * 1e3, 2)}
    if before:
        for name in ("collectives", "sent"):
            found[name] = (getattr(opt.answers, name) - before[name]) / options.repeats
    print(" ".join(f"{name} {value}" for name, value in found.items()), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all ranks together")
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    head: dict[str, Any] = {
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.machine(),
        "threads": options.threads,
    }
    if options.ranks == 1:
        torch.set_num_threads(options.threads)
        rate = matrix_rate(device, options.repeats)
        head["matrix_tflops"] = round(rate / 1e12, 3)
        for name in ("quintic", "gram"):
            head[f"rate_{name}"] = round(orthogonal_rate(name, options.size, device, options.repeats) / rate, 3)
        print(head, flush=True)
    queue = mp.get_context("spawn").SimpleQueue()
    if options.ranks == 1:
        job(0, options, queue)
    else:
        mp.start_processes(job, (options, queue), nprocs=options.ranks, start_method="spawn")
    out = options.out or RESULTS / f"muon_{options.ranks}.json"
    out.write_text(json.dumps({**head, "rows": queue.get()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
