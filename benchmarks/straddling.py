"""Steps of matrices whose columns are cut, inside of blocks and between them; by kernels and by the reference.

    python -m benchmarks.straddling [--ranks 2] [--rows 1024] [--matrices 4]

TP cuts the 11,008 columns of a Llama-2 down projection into 1,376 a rank over 8 ranks: five blocks of 256 and three
eighths. Ranks hold 1,376 columns of every matrix, or 1,536, which are six blocks; figures are medians of a rank.
"""

import argparse
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import shardopt

RESULT = Path(__file__).parent / "results" / "straddling.json"
COLUMNS = {"inside of blocks": 1376, "between blocks": 1536}
STATES = ("int8", "int4")


def milliseconds(state: str, columns: int, fused: bool, options: Any, mesh: Any) -> float:
    def local(scale: float) -> DTensor:
        return DTensor.from_local(torch.randn(options.rows, columns) * scale, mesh, [Shard(1)], run_check=False)

    ps = [nn.Parameter(local(0.02)) for _ in range(options.matrices)]
    optimizer = shardopt.AdamW(ps, state=state, fused=fused)
    for p in ps:
        p.grad = local(1e-3)
    spent = []
    for _ in range(options.repeats if fused else 5):
        dist.barrier()
        began = time.perf_counter()
        optimizer.step()
        spent.append(time.perf_counter() - began)
    return statistics.median(spent[3:]) * 1e3


def job(rank: int, options: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=options.port)
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    dist.init_process_group("gloo", rank=rank, world_size=options.ranks)
    mesh = init_device_mesh("cpu", (options.ranks,))
    rows: list[dict[str, Any]] = []
    for state in STATES:
        for cut, columns in COLUMNS.items():
            for fused in (True, False):
                ms = milliseconds(state, columns, fused, options, mesh)
                ns = ms * 1e6 / (options.matrices * options.rows * columns)
                rows.append({"state": state, "cut": cut, "fused": fused, "ms": round(ms, 2), "ns": round(ns, 2)})
                if rank == 0:
                    what = "kernel" if fused else "reference"
                    print(f"{state:5} {cut:17} {what:10} {ms:9.2f} ms {ns:8.2f} ns a local element", flush=True)
    if rank == 0:
        about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
        options.out.write_text(json.dumps({**about, "ranks": options.ranks, "rows": rows}, indent=1) + "\n")
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--matrices", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--port", default="29571")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    mp.start_processes(job, (options,), nprocs=options.ranks, start_method="spawn")


if __name__ == "__main__":
    main()
