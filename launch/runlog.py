"""A run's folder: held by one run at a time; its JSONL log, a line an update, cut back to the restored step."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from pathlib import Path
from typing import Any, TextIO


def claim(out: Path, patience: float = 20.0) -> TextIO:
    """The open file that holds the folder until it is closed or its process ends; another run's is waited for so many
    seconds, since ranks outlive a killed torchrun for a while. ValueError where that run goes on.

    A file system without locks holds nothing.
    """
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "lock").open("a+", encoding="utf-8")
    deadline, told = time.monotonic() + patience, False
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            if time.monotonic() < deadline:
                if not told:
                    print(f"waiting for another run to leave {out} ({holder})", flush=True)
                told = True
                time.sleep(0.2)
                continue
            file.close()
            raise ValueError(f"another run is at work in {out} ({holder}); stop it or choose another --out") from None
        except OSError:
            return file
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        return file


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; a kill may have torn the last one."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class RunLog:
    """Appends lines on rank 0, does nothing elsewhere; `seconds` is the training time before this start."""

    def __init__(self, path: Path, step: int, first: bool) -> None:
        self.seconds = 0.0
        self.last: dict[str, Any] = {}
        self.file: TextIO | None = None
        if not first:
            return
        kept = [line for line in read(path) if line["step"] <= step]
        path.parent.mkdir(parents=True, exist_ok=True)
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(fresh, path)
        if kept:
            self.seconds, self.last = float(kept[-1]["time"]), kept[-1]
        self.file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, **values: Any) -> None:
        self.last = values
        if self.file:
            self.file.write(json.dumps(values) + "\n")

    def close(self) -> None:
        if self.file:
            self.file.close()
