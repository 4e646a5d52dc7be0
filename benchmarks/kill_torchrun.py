"""Kills `torchrun launch/pretrain.py` on two ranks at random times and checks that its losses do not notice."""

import random
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from launch import runlog, runs
from shardopt.dtensor import manifest

OPTIONS = {
    "steps": 24,
    "checkpoint-every": 4,
    "keep": 2,
    "eval-every": 0,
    "eval-batches": 1,
    "sample": 0,
    "plot": False,
    "dim": 32,
    "layers": 2,
    "context": 32,
    "global-batch": 4,
    "state": "int8",
    "param-dtype": "bf16",
    "rounding": "stochastic",
}


def begin(out: Path, told: Path) -> Any:
    options = [word for name, value in OPTIONS.items() for word in (f"--{name}", str(value))]
    return runs.begin(2, *options, "--out", str(out), output=told)


def kill_torchrun(count: int, seed: int) -> list[dict[str, Any]]:
    """Kills of `torchrun launch/pretrain.py` on two ranks, all its processes at once; its losses must not notice."""
    choice, kills = random.Random(seed), []
    root = Path(tempfile.mkdtemp(prefix="shardopt_kill_"))
    try:
        started = time.monotonic()
        first_line = None
        run = begin(root / "whole", root / "whole.txt")
        while run.poll() is None:
            time.sleep(0.05)
            if first_line is None and runlog.read(root / "whole" / "log.jsonl"):
                first_line = time.monotonic() - started
        assert run.returncode == 0, (root / "whole.txt").read_text()[-3000:]
        whole, total = losses(root / "whole"), time.monotonic() - started
        for number in range(count):
            out = root / f"run{number}"
            killed = False
            while not killed:
                shutil.rmtree(out, ignore_errors=True)
                run = begin(out, root / "killed.txt")
                after = choice.uniform(0.8 * (first_line or 0.0), total)
                time.sleep(after)
                killed = run.poll() is None
                runs.kill(run)
            left, committed = (
                sorted(find(out / "checkpoints")) for find in (manifest.step_folders, manifest.committed)
            )
            failure = None
            try:
                check_resume(out, root / f"again{number}.txt", committed, whole)
            except AssertionError as error:
                failure = str(error)
            kills.append(
                {
                    "failure": failure,
                    "kind": "torchrun",
                    "at": f"{after:.2f} s of {total:.2f}",
                    "found": left,
                    "resumed": max(committed, default=0),
                    "during_a_save": left != committed,
                }
            )
            shutil.rmtree(out)
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return kills


def check_resume(out: Path, told: Path, committed: list[int], whole: list[tuple[int, float]]) -> None:
    """Start again: it resumes from the newest committed step, its losses are those of the run nobody killed."""
    assert begin(out, told).wait() == 0, told.read_text()[-3000:]
    expected = f"resumed after step {max(committed)}" if committed else "starting at step 0"
    assert expected in told.read_text(), f"expected {expected!r}: {told.read_text()[-2000:]}"
    other = [pair for pair in zip(losses(out), whole) if pair[0] != pair[1]]
    assert losses(out) == whole, f"the resumed run's losses are not the uninterrupted one's: {other[:3]}"
    assert sorted(manifest.step_folders(out / "checkpoints")) == sorted(manifest.committed(out / "checkpoints"))


def losses(out: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in runlog.read(out / "log.jsonl")]
