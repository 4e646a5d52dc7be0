"""What a step costs: time, bandwidth, temporaries; ours and, in the same run, those of whoever else is installed.

    python -m benchmarks.step                             everything, at sizes that fit the machine
    python -m benchmarks.step --sets big --only "shardopt int8" "torch fused"

The contenders of a set take turns, step by step, so that a noisy machine is as noisy for all; figures are medians.
Bandwidth counts every byte of parameter, gradient and state once, read and written where it is both. Absolute times
are only worth quoting from a GPU; on a CPU read the ratios.
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
from torch import Tensor, nn

import shardopt

RESULTS = Path(__file__).parent / "results"
SLOW = 1.0  # seconds of a step that is not worth waiting for
Make = Callable[[list[nn.Parameter]], Any]


def ours(state: Any, cls: Any = shardopt.AdamW, **options: Any) -> Make:
    return lambda params: cls(params, lr=1e-3, weight_decay=0.1, state=state, fused=True, **options)


def theirs(module: str, name: str, **options: Any) -> Make:
    """An optimizer of another package; ImportError where it is not installed."""

    def make(params: list[nn.Parameter]) -> Any:
        cls = getattr(__import__(module, fromlist=[name]), name)
        return cls(params, lr=1e-3, **options)

    return make


BLOCKS_OF_128 = {"signed": "sqrt8(block=128)", "non_negative": "root4(block=128)"}
CONTENDERS: dict[str, Make] = {
    "torch fused": theirs("torch.optim", "AdamW", fused=True),
    "torch foreach": theirs("torch.optim", "AdamW", foreach=True),
    "shardopt fp32": ours("fp32"),
    "shardopt bf16": ours("bf16"),
    "shardopt int8": ours("int8"),
    "shardopt int8, blocks of 128": ours(BLOCKS_OF_128),
    "shardopt int4": ours("int4"),
    "shardopt Lion int8": ours("int8", shardopt.Lion),
    "torchao 8 bit": theirs("torchao.optim", "AdamW8bit"),
    "torchao 4 bit": theirs("torchao.optim", "AdamW4bit"),
    "bitsandbytes 8 bit": theirs("bitsandbytes.optim", "AdamW8bit"),
    "adafactor8bit": theirs("adafactor8bit", "Adafactor8Bit"),
    "gefen": theirs("gefen", "Gefen"),
    "flashoptim": theirs("flashoptim", "FlashAdamW"),
}
LOW = {
    "torch fused, bf16": CONTENDERS["torch fused"],
    "shardopt int8, bf16": ours("int8", rounding="stochastic"),
    "shardopt int4, bf16": ours("int4", rounding="stochastic"),
}


def llama(dim: int, ffn: int, vocab: int, layers: int = 32) -> list[tuple[int, ...]]:
    """291 tensors for 32 layers, as in Llama 2."""
    block: list[tuple[int, ...]] = [(dim, dim)] * 4 + [(ffn, dim)] * 2 + [(dim, ffn)] + [(dim,)] * 2
    return [(vocab, dim), *block * layers, (dim,), (vocab, dim)]


def sets(gpu: bool) -> dict[str, list[tuple[int, ...]]]:
    big = [(32768, 32768)] if gpu else [(4096, 4096)]
    return {
        "big": big,
        "llama": llama(2048, 5504, 32000) if gpu else llama(256, 688, 8000),
        "many": [(64, 128)] * 1434,
        "dtensors": [(4, 8)] * 1434,
    }


def parameters(shapes: list[tuple[int, ...]], dtype: torch.dtype, device: str, mesh: Any) -> list[nn.Parameter]:
    made = []
    for shape in shapes:
        p, g = torch.randn(shape, device=device) * 0.02, torch.randn(shape, device=device) * 1e-3
        if mesh is not None:
            from torch.distributed.tensor import Shard, distribute_tensor

            p, g = (distribute_tensor(t, mesh, [Shard(0)]) for t in (p, g))
        made.append(nn.Parameter(p.to(dtype)))
        made[-1].grad = g.to(dtype)
    return made


def moved(params: list[nn.Parameter], opt: Any) -> int:
    """Bytes of one step: parameters and states read and written, gradients read."""
    states = [t for state in opt.state.values() for t in state.values() if isinstance(t, Tensor) and t.numel() > 1]
    size = lambda tensors: sum(t.numel() * t.element_size() for t in tensors)  # noqa: E731
    return 3 * size(params) + 2 * size(states)


def temporaries(opt: Any, device: str) -> int:
    """Largest sum of bytes that one step holds beside what was there."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        opt.step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof:
        opt.step()
    held = most = 0
    for event in prof.profiler.kineto_results.events():  # type: ignore[union-attr]
        held += event.nbytes() if event.name() == "[memory]" else 0
        most = max(most, held)
    return most


def launches(opt: Any, device: str) -> int | None:
    """Kernels that one step launches on a GPU; calls of native kernels on a CPU, where only ours are known."""
    if device == "cpu":
        return len(opt.native.calls) if getattr(opt, "native", None) is not None else None
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        opt.step()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in prof.events())


def host(opt: Any, device: str) -> float | None:
    """Seconds until a step returns while the device is still at work; on a CPU a step is all host."""
    if device == "cpu":
        return None
    times = []
    for _ in range(7):
        torch.cuda.synchronize()
        began = time.perf_counter()
        opt.step()
        times.append(time.perf_counter() - began)
    torch.cuda.synchronize()
    return statistics.median(times)


class Clock:
    """Seconds of a call, on the device."""

    def __init__(self, device: str) -> None:
        self.device = device

    def __call__(self, call: Callable[[], Any]) -> float:
        if self.device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        if self.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began


def measure(name: str, shapes: list[tuple[int, ...]], chosen: list[str], repeats: int, device: str) -> list[dict]:
    mesh = None
    if name == "dtensors":
        if not dist.is_initialized():
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29581", RANK="0", WORLD_SIZE="1")
            dist.init_process_group("cpu:gloo,cuda:nccl" if device == "cuda" else "gloo")
        mesh = dist.device_mesh.init_device_mesh(device, (1,))
    clock, running = Clock(device), {}
    for who, make in {**CONTENDERS, **LOW}.items():
        if chosen and who not in chosen:
            continue
        dtype = torch.bfloat16 if who in LOW else torch.float32
        params = parameters(shapes, dtype, device, mesh)
        try:
            opt = make(params)
            first = clock(opt.step)
            if clock(opt.step) > SLOW and who not in chosen:
                raise RuntimeError(f"a step takes more than {SLOW} s; --only measures it")
        except Exception as error:  # not installed, or refuses this set
            print(f"{name:9} {who:30} left out: {str(error).splitlines()[0][:80]}", flush=True)
            continue
        running[who] = (opt, params, first, [])
    source = torch.randn(1 << 26 if device == "cpu" else 1 << 29, device=device)
    target, copies = torch.empty_like(source), []
    for _ in range(repeats):
        for opt, _, _, times in running.values():
            times.append(clock(opt.step))
        copies.append(clock(lambda: target.copy_(source)))
    copy = 2 * source.numel() * 4 / statistics.median(copies)
    rows = []
    for who, (opt, params, first, times) in running.items():
        seconds, bytes_, n = statistics.median(times), moved(params, opt), sum(p.numel() for p in params)
        rows.append(
            {
                "set": name,
                "who": who,
                "ns_per_parameter": round(seconds / n * 1e9, 4),
                "ms": round(seconds * 1e3, 3),
                "bytes_per_parameter": round(bytes_ / n, 3),
                "gb_per_s": round(bytes_ / seconds / 1e9, 2),
                "of_copy_bandwidth": round(bytes_ / seconds / copy, 3),
                "temporaries_per_parameter_byte": round(
                    temporaries(opt, device) / sum(p.numel() * p.element_size() for p in params), 4
                ),
                "first_step_ms": round(first * 1e3, 1),
                "launches": launches(opt, device),
                "host_ms": None if (spent := host(opt, device)) is None else round(spent * 1e3, 3),
            }
        )
    base = next((row["ms"] for row in rows if row["who"] == "torch fused"), None)
    for row in rows:
        row["of_torch_fused"] = round(row["ms"] / base, 3) if base else None
        print(
            f"{name:9} {row['who']:30} {row['ns_per_parameter']:9.3f} ns/p {row['ms']:9.2f} ms  x torch "
            f"{row['of_torch_fused']}  {row['gb_per_s']} GB/s, {row['of_copy_bandwidth']} of copy  temporaries "
            f"{row['temporaries_per_parameter_byte']}  launches {row['launches']}  host {row['host_ms']} ms",
            flush=True,
        )
    return rows


TITLES = {
    "big": "one large tensor",
    "llama": "a small Llama",
    "many": "many small tensors",
    "dtensors": "many small DTensors",
}


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Every contender's step beside torch's fused AdamW on fp32, one panel a set."""
    from matplotlib.figure import Figure

    names = list(dict.fromkeys(row["set"] for row in rows if row["of_torch_fused"]))
    if not names:
        return
    figure = Figure(figsize=(11, 1.2 + 0.28 * len({row["who"] for row in rows})), layout="constrained")
    who = list(dict.fromkeys(row["who"] for row in rows))[::-1]
    for axes, name in zip(figure.subplots(1, len(names), sharey=True, squeeze=False)[0], names):
        found = {row["who"]: row["of_torch_fused"] for row in rows if row["set"] == name}
        for y, contender in enumerate(who):
            if contender in found:
                axes.barh(y, found[contender], color="tab:blue" if contender.startswith("shardopt") else "silver")
                axes.text(found[contender], y, f" {found[contender]:.2f}", va="center", fontsize=8)
        axes.set_xscale("log")
        axes.set_xlim(min(0.02, min(found.values()) / 2), 20 * max(found.values()))
        axes.axvline(1, color="gray", linewidth=0.8)
        axes.set_yticks(range(len(who)), who)
        axes.set_title(TITLES.get(name, name))
    figure.supxlabel("time of a step / that of torch.optim.AdamW(fused=True) on fp32")
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--sets", nargs="*", choices=list(sets(False)), default=list(sets(False)))
    parser.add_argument("--only", nargs="*", default=[], help="contenders, by name")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if options.threads:
        torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.processor() or platform.machine()}"
    head = {"torch": torch.__version__, "machine": machine, "threads": torch.get_num_threads()}
    options.out.parent.mkdir(parents=True, exist_ok=True)
    for name in options.sets:  # what is measured is kept, should the rest take too long
        rows += measure(name, sets(device == "cuda")[name], options.only, options.repeats, device)
        options.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    draw(rows, options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
