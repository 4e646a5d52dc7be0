"""A second geometry: a student learns a two-layer teacher from inputs of condition 1e4; paired seeds.

    python -m benchmarks.teacher

Prints the final loss of every format relative to fp32 state with the same seed and data, at the rate that is best for
fp32. A format that only suits language models shows here.
"""

import argparse
import json
import statistics
from math import isfinite, log
from pathlib import Path
from typing import Any

import torch
from torch import nn

import shardopt
from tests.bad_codecs import LinearUint4, LinearUint8

RESULTS = Path(__file__).parent / "results" / "teacher.json"
INPUTS, HIDDEN, OUTPUTS, BATCH, STEPS = 64, 128, 32, 256, 1500
STATES: dict[str, Any] = {
    "fp32": "fp32",
    "int8": "int8",
    "sqrt8+log8": {"signed": "sqrt8", "non_negative": "log8"},
    "int8+log8": {"signed": "int8", "non_negative": "log8"},
    "int4": "int4",
    "int4+log4": {"signed": "int4", "non_negative": "log4"},
    "factored": "factored",
    "bf16": "bf16",
    "control: linear int4": {"signed": "int4", "non_negative": LinearUint4()},
    "control: linear uint8 v": {"signed": "int8", "non_negative": LinearUint8()},
}


def network() -> nn.Sequential:
    return nn.Sequential(nn.Linear(INPUTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, OUTPUTS))


def train(state: Any, seed: int, lr: float) -> float:
    """Mean loss of the last 100 steps over the variance of the targets."""
    torch.manual_seed(seed)
    teacher, student = network(), network()
    rotation = torch.linalg.qr(torch.randn(INPUTS, INPUTS)).Q
    scales = torch.logspace(0, -2, INPUTS)  # singular values; their squares have condition 1e4
    optimizer = shardopt.AdamW(student.parameters(), lr=lr, weight_decay=0.0, state=state)
    tail, spread = [], 1.0
    for step in range(STEPS):
        x = (torch.randn(BATCH, INPUTS) * scales * 4) @ rotation
        with torch.no_grad():
            y = teacher(x)
        if step == 0:
            spread = float(y.var())
        loss = (student(x) - y).square().mean() / spread
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 2 * (STEPS - step) / STEPS)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step >= STEPS - 100:
            tail.append(float(loss.detach()))
    return statistics.mean(tail)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    torch.set_num_threads(1)
    rates = (1e-3, 3e-3, 1e-2, 3e-2)
    tuned = {lr: train("fp32", 0, lr) for lr in rates}
    lr = min(tuned, key=lambda rate: tuned[rate])
    print("fp32 by rate:", {rate: f"{loss:.3e}" for rate, loss in tuned.items()}, flush=True)
    result: dict[str, Any] = {"lr": lr, "torch": torch.__version__, "seeds": options.seeds, "formats": {}}
    base: list[float] = []
    for name, state in STATES.items():
        losses = [train(state, seed, lr) for seed in range(options.seeds)]
        base = base or losses
        ratios = [log(loss / b) if isfinite(loss) else float("inf") for loss, b in zip(losses, base)]
        result["formats"][name] = {"loss": statistics.mean(losses), "log_ratio_to_fp32": statistics.mean(ratios)}
        print(f"{name:26} loss {statistics.mean(losses):.3e}  log ratio {statistics.mean(ratios):+.3f}", flush=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
