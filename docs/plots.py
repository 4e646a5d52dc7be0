"""Draws the figures of docs/quality.md from benchmarks/results/quality.jsonl: `python docs/plots.py`."""

import json
import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
ROWS = [json.loads(line) for line in (HERE.parent / "benchmarks/results/quality.jsonl").read_text().splitlines()]
SEEDS = (20, 21, 22, 30, 31, 32)
TUNED = {"beta2": 0.97, "eps": 1e-8, "weight_decay": 0.1, "embed_lr": 6e-2, "steps": 300}
NAMES = {
    "adamw-fp32": "fp32",
    "adamw-int8": "int8 (sqrt8, root4)",
    "adamw-int4": "int4 (dyn4, log4)",
    "adamw-factored": "factored (int8, factored)",
    "adamw-fp32-bf16-stochastic": "bf16 weights, stochastic",
    "control-linear-int4": "linear int4, no zero",
    "control-plain-int4": "control: plain int4",
    "control-linear-uint8": "control: linear uint8 v",
}
MUONS = {
    "muon-int8-exact": "int8 momentum, exact wire",
    "muon-fp32-int8": "fp32 momentum, int8 wire",
    "muon-int8-int8": "int8 momentum, int8 wire (default)",
    "muon-int8-int8+int4": "int8 momentum, int8+int4 wire",
    "muon-minimax": "fp32, exact, minimax",
    "control-muon-int4-gather": "control: int4 on the way there",
    "control-muon-3-bit-gather": "control: 3 bits on the way there",
    "control-muon-int4-state": "control: int4 momentum",
}
PANELS = (  # title, learning rate of the matrices, what others are paired with, names
    ("AdamW, against fp32 state", 6e-3, "adamw-fp32", {name: NAMES[name] for name in NAMES if name != "adamw-fp32"}),
    ("Muon, against fp32 momentum and an exact wire", 1.6e-2, "muon-fp32-exact", MUONS),
)


def losses(name: str, lr: float) -> dict[int, float]:
    rows = [row for row in ROWS if row["name"] == name and row["seed"] in SEEDS and row["lr"] == lr]
    return {row["seed"]: row["loss"] for row in rows if all(row[key] == value for key, value in TUNED.items())}


def differences() -> None:
    """Paired differences, one point a seed and their mean; a panel for AdamW and one for Muon, to one scale."""
    heights = [len(names) for *_, names in PANELS]
    figure, panels = plt.subplots(2, sharex=True, figsize=(8, 7.5), height_ratios=heights, layout="constrained")
    for axes, (title, lr, base, names) in zip(panels, PANELS):
        for y, name in enumerate(reversed(names)):
            pairs = [loss - losses(base, lr)[seed] for seed, loss in losses(name, lr).items()]
            if any(pair != pair for pair in pairs):
                axes.text(0.006, y, "diverges", va="center", color="tab:red")
                continue
            axes.plot(pairs, [y] * len(pairs), "o", color="tab:blue", alpha=0.5)
            axes.plot([statistics.mean(pairs)], [y], "|", color="black", markersize=16)
        axes.axvspan(-0.005, 0.005, color="tab:green", alpha=0.15)
        axes.axvline(0, color="gray", linewidth=0.8)
        axes.set_ylim(-0.7, len(names) - 0.3)
        axes.set_yticks(range(len(names)), [names[name] for name in reversed(names)])
        axes.set_title(title)
    figure.supxlabel("difference of validation loss, same seed, nats a byte (line: mean; band: 0.005)", fontsize=10)
    figure.savefig(HERE / "quality.png", dpi=130)


def long_run() -> None:
    """Training loss of the longer run, every tenth step."""
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    names = {"adamw-fp32": "AdamW fp32", "muon-fp32-exact": "Muon, fp32 momentum, exact wire"}
    names |= {name: f"AdamW {NAMES[name]}" for name in NAMES if name != "adamw-fp32"}
    names |= {name: f"Muon, {MUONS[name]}" for name in MUONS}
    for row in ROWS:
        if row["steps"] == 1000 and row["curve"]:
            every = row["steps"] // len(row["curve"])
            curve = [statistics.mean(row["curve"][max(0, i - 2) : i + 3]) for i in range(len(row["curve"]))]
            label = f"{names[row['name']]}: validation {row['loss']:.4f}"
            axes.plot([i * every for i in range(len(curve))], curve, label=label, linewidth=1)
    axes.set_ylim(1.0, 3.0)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats a byte), mean of five points")
    axes.legend()
    figure.savefig(HERE / "long.png", dpi=130)


if __name__ == "__main__":
    differences()
    long_run()
