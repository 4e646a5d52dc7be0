"""What orthogonalizing a matrix costs on a CPU, and how near to 1 it brings the singular values.

    python -m benchmarks.polar                    on two threads and on one
    python -m benchmarks.polar --repeats 31 --threads 1

Trust figures of several threads only on an idle machine: threads wait for each other at the end of every product, and
ours are more and smaller. Of a busy machine the processor time of one thread holds.

Both sides take turns in one process, so that a busy machine is as busy for both; figures are medians. "plain" is five
steps of the quintic in whole products (torch.optim.Muon's, in fp32). Read the ratios, and the interval beside them:
time is only comparable where the singular values are at least as near to 1.
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
from torch import Tensor

from shardopt.polar import Gram, NewtonSchulz

RESULTS = Path(__file__).parent / "results" / "polar.json"
SHAPES = ((1024, 1024), (1024, 4096))


def plain(x: Tensor) -> Tensor:
    """Five steps of the quintic, as everybody writes them; x is wide."""
    y = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = y @ y.mT
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), y, beta=3.4445)
    return y


SIDES: dict[str, Callable[[Tensor], Tensor]] = {
    "plain quintic, 5 steps": plain,
    "quintic, 5 steps": NewtonSchulz(),
    "quintic, 5 steps, Gram": Gram(),
    "minimax(0.001), 5 steps, tight": Gram(coefficients="minimax(0.001)", norm="tight"),
    "minimax(0.005), 4 steps, tight": Gram(coefficients="minimax(0.005)", norm="tight", steps=4),
}


def matrix(spectrum: str, rows: int, cols: int) -> Tensor:
    """Gaussian; Gaussian with 32 directions that stand out (a momentum); singular values 1/i."""
    torch.manual_seed(0)
    x = torch.randn(rows, cols)
    if spectrum == "spiked":
        x += 0.5 * torch.randn(rows, 32) @ torch.randn(32, cols)
    if spectrum == "power -1":
        left, right = torch.linalg.qr(torch.randn(rows, rows)).Q, torch.linalg.qr(torch.randn(cols, rows)).Q
        x = left / torch.arange(1, rows + 1) @ right.T
    return x


Basis = tuple[Tensor, Tensor]


def basis(x: Tensor) -> Basis:
    """Left and right singular vectors."""
    left, _, right = torch.linalg.svd(x.double(), full_matrices=False)
    return left, right


def quality(vectors: Basis, y: Tensor) -> dict[str, float]:
    """Singular values of the result, least, greatest and 1 % from below; cosine to the true polar factor.

    The result has the singular vectors of x, so that its values are read off in their basis.
    """
    left, right = vectors
    values = ((left.mT @ y.double()) * right).sum(1)
    cosine = values.sum() / (y.double().norm() * values.numel() ** 0.5)
    low = values.quantile(torch.tensor(0.01, dtype=torch.float64))
    figures = {"least": values.min(), "one_percent": low, "greatest": values.max(), "cosine": cosine}
    return {name: round(float(value), 4) for name, value in figures.items()}


def alternate(x: Tensor, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of every side: wall time, and processor time of all threads."""
    wall: dict[str, list[float]] = {name: [] for name in SIDES}
    processor: dict[str, list[float]] = {name: [] for name in SIDES}
    for side in SIDES.values():
        side(x)
    for _ in range(repeats):
        for name, side in SIDES.items():
            start, busy = time.perf_counter(), time.process_time()
            side(x)
            wall[name].append(time.perf_counter() - start)
            processor[name].append(time.process_time() - busy)
    return {name: (statistics.median(wall[name]) * 1e3, statistics.median(processor[name]) * 1e3) for name in SIDES}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, nargs="+", default=[2, 1])
    options = parser.parse_args()
    load = os.getloadavg()[0]
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        x = matrix("Gaussian", *shape)
        for threads in options.threads:
            torch.set_num_threads(threads)
            times = alternate(x, options.repeats)
            base = times["plain quintic, 5 steps"]
            for name, (wall, busy) in times.items():
                row = {"shape": shape, "threads": threads, "who": name, "ms": round(wall, 2), "cpu_ms": round(busy, 2)}
                rows.append({**row, "speed": round(base[0] / wall, 3), "cpu_speed": round(base[1] / busy, 3)})
                print(*rows[-1].values(), flush=True)
    for shape in SHAPES:
        for spectrum in ("Gaussian", "spiked", "power -1"):
            x = matrix(spectrum, *shape)
            vectors = basis(x)
            for name, side in SIDES.items():
                rows.append({"shape": shape, "spectrum": spectrum, "who": name, **quality(vectors, side(x))})
                print(*rows[-1].values(), flush=True)
    result = {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "load": [round(load, 2), round(os.getloadavg()[0], 2)],
        "repeats": options.repeats,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
