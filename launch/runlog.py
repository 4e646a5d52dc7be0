"""The run's JSONL log: one line an update, cut back to the restored step when a run resumes."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, TextIO


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
