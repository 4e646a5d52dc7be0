"""When a run saves, what a checkpoint holds beside model and optimizer, and how a run finds its place again."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import shardopt

from .config import Config
from .data import Corpus

# What decides which sequence is trained at which step; with another value a resumed curve would be another run's.
DATA_ORDER = ("seed", "global_batch", "context", "val_fraction")


class Checkpoints:
    """At most one asynchronous save is under way; the next one, and the end of the run, wait for it."""

    def __init__(self, config: Config, model: nn.Module, optimizer: Any, corpus: Corpus) -> None:
        self.config, self.model, self.optimizer, self.corpus = config, model, optimizer, corpus
        self.path = Path(config.out) / "checkpoints"
        self.pending: Any = None
        self.saved = -1

    def restore(self) -> int:
        """Load the latest checkpoint, if there is one; the number of updates done."""
        # Rank 0 looks for all: what another machine sees of a shared folder may be late.
        found = [any(self.path.glob("step_" + "[0-9]" * 8))]
        dist.broadcast_object_list(found)
        if self.config.resume == "never" and found[0]:
            raise ValueError(f"{self.path} holds checkpoints; with --resume never choose another --out or remove them")
        extra = shardopt.load_checkpoint(self.path, self.model, self.optimizer, step="latest") if found[0] else None
        if extra is None:
            return 0
        then, now = extra["config"], dataclasses.asdict(self.config)
        changed = [f"{key}: {then[key]} then, {now[key]} now" for key in DATA_ORDER if then[key] != now[key]]
        if extra["corpus"] != self.corpus.hash:
            changed.append(f"corpus: {extra['corpus']} then, {self.corpus.hash} now")
        if changed:
            raise ValueError(f"{self.path} belongs to another data order ({'; '.join(changed)}); choose another --out")
        self.saved = int(extra["step"])
        return self.saved

    @property
    def folder(self) -> Path:
        """Of what was saved or loaded last."""
        return self.path / f"step_{self.saved:08d}"

    def told(self) -> str:
        """For people: from where the run goes on, or that it cannot."""
        if self.saved < 0:
            return f"no complete checkpoint in {self.path}: this run begins anew"
        return f"going on from {self.folder}"

    def due(self, step: int) -> bool:
        """Whether to save after this update: in every period, and once soon, so that an early kill costs little."""
        every, first = self.config.checkpoint_every, self.config.first_checkpoint
        return every > 0 and (step % every == 0 or step == first < every)

    def save(self, step: int, blocking: bool = False) -> None:
        if step == self.saved:
            return
        self.wait()
        extra = {"corpus": self.corpus.hash, "config": dataclasses.asdict(self.config)}
        self.pending = shardopt.save_checkpoint(
            self.path, self.model, self.optimizer, step=step, extra=extra, keep=self.config.keep, blocking=blocking
        )
        self.saved = step

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def size(self) -> int:
        """Bytes of the latest checkpoint's files."""
        folders = sorted(self.path.glob("step_" + "[0-9]" * 8))
        return sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file()) if folders else 0
