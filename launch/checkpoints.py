"""When a run saves, what a checkpoint holds beside model and optimizer, and how a run finds its place again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import nn

import shardopt

from . import runlog
from .config import Config
from .data import Corpus

# What decides which sequence is trained at which step, and what the weights mean, whose shapes do not tell all of it;
# with another value a resumed curve would be another run's.
DATA_ORDER = ("seed", "global_batch", "context", "val_fraction")
MODEL = ("vocab", "dim", "layers", "heads", "kv_heads", "hidden", "rope_base", "qk_norm", "tied")


class Checkpoints:
    """At most one asynchronous save is under way; the next one, and the end of the run, wait for it."""

    def __init__(self, config: Config, model: nn.Module, optimizer: Any, corpus: Corpus) -> None:
        self.config, self.model, self.optimizer, self.corpus = config, model, optimizer, corpus
        self.path = Path(config.out) / "checkpoints"
        self.pending: Any = None
        self.held: Any = None  # open for as long as the folder is this run's
        self.saved = -1

    def restore(self) -> int:
        """Load the latest checkpoint, if there is one; the number of updates done."""
        # Rank 0 looks for all: what another machine sees of a shared folder may be late.
        found: list[Any] = [False, ""]
        if dist.get_rank() == 0:
            try:
                self.held = runlog.claim(self.path.parent)
                found[0] = any(self.path.glob("step_" + "[0-9]" * 8))
            except (ValueError, OSError) as error:
                found[1] = str(error)  # told to all, who would wait
        dist.broadcast_object_list(found)
        if found[1]:
            raise ValueError(found[1])
        if self.config.resume == "never" and found[0]:
            raise ValueError(f"{self.path} holds checkpoints; with --resume never choose another --out or remove them")
        extra = shardopt.load_checkpoint(self.path, self.model, self.optimizer, step="latest") if found[0] else None
        if extra is None:
            return 0
        other = another(extra, self.extra())
        if other:
            raise ValueError(f"{self.path} belongs to {other}; choose another --out")
        self.saved = int(extra["step"])
        return self.saved

    def extra(self) -> dict[str, Any]:
        """What a checkpoint holds besides: whose run it is of."""
        return {"corpus": self.corpus.hash, "config": dataclasses.asdict(self.config)}

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
        self.pending = shardopt.save_checkpoint(
            self.path, self.model, self.optimizer, step=step, extra=self.extra(), keep=self.config.keep,
            blocking=blocking,
        )  # fmt: skip
        self.saved = step

    def wait(self) -> None:
        if self.pending is not None:
            self.pending.wait()
            self.pending = None

    def size(self) -> int:
        """Bytes of the latest checkpoint's files."""
        folders = sorted(self.path.glob("step_" + "[0-9]" * 8))
        return sum(file.stat().st_size for file in folders[-1].rglob("*") if file.is_file()) if folders else 0


def another(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """What a checkpoint's run has that this one has not, for people; empty where one continues the other."""
    old, new = ({**extra["config"], "corpus": extra["corpus"]} for extra in (then, now))
    for what, keys in (("another model", MODEL), ("another data order", (*DATA_ORDER, "corpus"))):
        changed = [f"{key}: {old[key]} then, {new[key]} now" for key in keys if old[key] != new[key]]
        if changed:
            return f"{what} ({'; '.join(changed)})"
    return ""
