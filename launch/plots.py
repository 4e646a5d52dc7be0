"""Draws loss curves of one or several runs: `python -m launch.plots fp32=RUN/log.jsonl int8=RUN/log.jsonl -o x.png`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path

from .runlog import read


def smooth(values: list[float], keep: float = 0.8) -> list[float]:
    """Exponential mean, corrected for its start at zero."""
    mean, out = 0.0, []
    for i, value in enumerate(values, 1):
        mean = keep * mean + (1 - keep) * value
        out.append(mean / (1 - keep**i))
    return out


def plot(runs: Mapping[str, Path], target: Path, marks: Mapping[str, int] | None = None, title: str = "") -> None:
    """Training loss (raw faint, smoothed strong) and validation points of each run; `marks` are labelled steps."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    low, high = float("inf"), float("-inf")
    for index, (label, path) in enumerate(runs.items()):
        lines, colour = read(path), f"C{index}"
        steps, losses = [x["step"] for x in lines], [x["loss"] for x in lines]
        curve = smooth(losses)
        low, high = min([low, *losses]), max([high, *curve])
        axes.plot(steps, losses, color=colour, alpha=0.2, linewidth=0.7)
        axes.plot(steps, curve, color=colour, linewidth=1.4, linestyle=("-", "--", ":")[index % 3], label=label)
        validation = [x for x in lines if "val_loss" in x]
        axes.plot([x["step"] for x in validation], [x["val_loss"] for x in validation], "o", color=colour, markersize=5)
    for text, step in (marks or {}).items():
        axes.axvline(step, color="0.5", linewidth=0.8, linestyle=":")
        axes.annotate(
            text, (step, 0.97), xycoords=("data", "axes fraction"), rotation=90, ha="right", va="top", fontsize=8
        )
    if low < high < float("inf"):
        axes.set_ylim(low - 0.03 * (high - low), high + 0.05 * (high - low))
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats a token); dots: validation")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.tight_layout()
    target.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target, dpi=130)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description="overlay the loss curves of several runs")
    parser.add_argument("runs", nargs="+", help="LABEL=PATH of a log.jsonl, or just the path")
    parser.add_argument("-o", "--out", default="loss.png")
    args = parser.parse_args()
    named = [item.split("=", 1) if "=" in item else [str(Path(item).parent.name or item), item] for item in args.runs]
    plot({label: Path(path) for label, path in named}, Path(args.out))


if __name__ == "__main__":
    main()
