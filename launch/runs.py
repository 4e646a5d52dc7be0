"""Starts the pretraining job under torchrun as a child, and kills such a run with everything that belongs to it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def command(ranks: int, *options: str) -> list[str]:
    if ranks == 1:  # torchrun would import torch once more
        return [sys.executable, "-m", "launch.pretrain", *options]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*torchrun, "-m", "launch.pretrain", *options]


def begin(ranks: int, *options: str, output: Path | None = None) -> subprocess.Popen[bytes]:
    """Start a run in the checkout; its stdout and stderr go to `output`, or to ours."""
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    if output is None:
        return subprocess.Popen(command(ranks, *options), cwd=ROOT, env=environment)
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as file:
        return subprocess.Popen(
            command(ranks, *options), cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
        )


def descendants(pid: int) -> list[int]:
    """`pid` and all below it: torchrun gives each rank a session of its own, so a process group does not hold them."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                # The name in parentheses may hold spaces; the parent is the second field after it.
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue
    found = [pid]
    for parent in found:
        found += [child for child, its in parents.items() if its == parent]
    return found


def workers(run: subprocess.Popen[bytes]) -> list[int]:
    """The ranks of a run, without torchrun itself."""
    return [pid for pid in descendants(run.pid) if pid != run.pid]


def kill(run: subprocess.Popen[bytes]) -> None:
    """SIGKILL to torchrun and to every rank: nothing can clean up."""
    for pid in descendants(run.pid):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue
    run.wait()
