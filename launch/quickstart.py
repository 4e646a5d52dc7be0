"""The whole promise in a few minutes on two cores: fp32 against int8 state, a SIGKILL, a resume on other ranks."""

from __future__ import annotations

import argparse
import json
import shutil
import time
from pathlib import Path
from typing import Any

from . import plots, runlog, runs

OUT = runs.ROOT / "runs" / "quickstart"


def options(name: str, state: str, steps: int, every: int) -> list[str]:
    chosen = {"state": state, "steps": steps, "checkpoint_every": every, "sample": 0, "plot": False, "out": OUT / name}
    config = runs.ROOT / "launch" / "configs" / "tiny.toml"
    return ["--config", str(config), *(text for key, value in chosen.items() for text in (f"--{key}", str(value)))]


def complete(ranks: int, name: str, chosen: list[str]) -> None:
    """Run to the end, its output in a file that is shown only when it fails."""
    output = OUT / f"{name}.txt"
    if runs.begin(ranks, *chosen, output=output).wait():
        raise SystemExit(f"the run {name} failed:\n{output.read_text(encoding='utf-8', errors='replace')[-4000:]}")


def kill_after(ranks: int, name: str, chosen: list[str], step: int) -> list[dict[str, Any]]:
    """Start, SIGKILL once `step` is logged, and return what had been logged until then."""
    run, log = runs.begin(ranks, *chosen, output=OUT / f"{name}.txt"), OUT / name / "log.jsonl"
    try:
        while not (lines := runlog.read(log)) or lines[-1]["step"] < step:
            if run.poll() is not None:
                raise SystemExit(f"the run {name} ended before step {step}; see {OUT / name}.txt")
            time.sleep(0.05)
    finally:
        runs.kill(run)
    return runlog.read(log)


def table(rows: list[list[str]]) -> str:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--ranks-after", type=int, default=3, help="ranks that the killed run is resumed on")
    args = parser.parse_args()
    every = max(args.steps // 6, 1)
    killed_at = args.steps // 2 + every // 2
    shutil.rmtree(OUT, ignore_errors=True)
    begin = time.monotonic()

    print(f"1/3  AdamW with fp32 state, {args.steps} steps on {args.ranks} ranks", flush=True)
    complete(args.ranks, "fp32", options("fp32", "fp32", args.steps, every))
    print(f"2/3  AdamW with int8 state, the same data; SIGKILL after step {killed_at}", flush=True)
    int8 = options("int8", "int8", args.steps, every)
    before = kill_after(args.ranks, "int8", int8, killed_at)
    print(f"3/3  the killed run, resumed on {args.ranks_after} ranks", flush=True)
    complete(args.ranks_after, "int8", int8)

    first_of_resume = resumed_after(OUT / "int8.txt")
    after = {line["step"]: line["loss"] for line in runlog.read(OUT / "int8" / "log.jsonl")}
    twice = [line for line in before if line["step"] > first_of_resume]
    gap = max((abs(after[line["step"]] - line["loss"]) for line in twice), default=0.0)
    rows = [["optimizer state", "validation loss", "state bytes/parameter", "checkpoint"]]
    for name in ("fp32", "int8"):
        summary = json.loads((OUT / name / "summary.json").read_text(encoding="utf-8"))
        size = f"{summary['checkpoint_bytes'] / 2**20:.2f} MiB"
        rows.append([name, f"{summary['val_loss']:.4f}", f"{summary['state_bytes_per_parameter']:.3f}", size])
    logs = {f"AdamW {name} state": OUT / name / "log.jsonl" for name in ("fp32", "int8")}
    marks = {"resumed from here": first_of_resume, "int8 killed": before[-1]["step"]}
    plots.plot(logs, OUT / "loss.png", marks, f"{args.ranks} ranks, then {args.ranks_after} for int8")
    print(f"\n{table(rows)}\n")
    print(f"killed after step {before[-1]['step']}, resumed after step {first_of_resume};")
    print(f"the {len(twice)} steps done twice differ by at most {gap:.1e} in loss")
    print(f"curves: {OUT.relative_to(runs.ROOT)}/loss.png")
    print(f"{time.monotonic() - begin:.0f} seconds")


def resumed_after(output: Path) -> int:
    """The step that the last start in a run's output says it resumed from."""
    steps = [
        line.split()[-1]
        for line in output.read_text(encoding="utf-8", errors="replace").splitlines()
        if line.startswith("resumed after step ")
    ]
    if not steps:
        raise SystemExit(f"the killed run did not resume; see {output}")
    return int(steps[-1])


if __name__ == "__main__":
    main()
