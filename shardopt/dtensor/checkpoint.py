"""Saves model and optimizer as torch.distributed.checkpoint does, committed and checked; loads on any mesh or codec."""

import json
from concurrent.futures import Future
from contextlib import suppress
from os import PathLike
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from torch.distributed.checkpoint import async_save, save
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from shardopt.dtensor.channel import Channel, channel
from shardopt.dtensor.manifest import (
    COMMITTED,
    Damaged,
    committed,
    damaged_files,
    is_checkpoint,
    lost,
    read_manifest,
    settle,
    step_name,
)
from shardopt.dtensor.record import optimizer_state, record_of
from shardopt.dtensor.restore import restore
from shardopt.dtensor.stored import Stored, quiet, reasons
from shardopt.dtensor.writer import CheckpointWriter
from shardopt.telling import tell

MODEL, OPTIM = "model", "optim"
VERIFIED_BYTES = 20_000_000_000  # checkpoints below this have their checksums verified unless told otherwise


class Save:
    """A save under way, or done. folder: the checkpoint's directory. told: whether its failure has been raised.

    first: whether this is rank 0, which undoes a save that failed.
    """

    def __init__(self, folder: Path, future: Future[Any] | None = None, first: bool = True) -> None:
        self.folder, self.future, self.told, self.first = folder, future, False, first
        self.awaited, self.undone, self.lock = False, False, Lock()
        if future is not None:
            future.add_done_callback(self.ended)

    def done(self) -> bool:
        return self.future is None or self.future.done()

    def wait(self) -> Path:
        """Wait until the checkpoint is committed; its directory. ValueError where saving failed, on any rank."""
        self.awaited = True
        try:
            if self.future is not None:
                self.future.result()
        except CheckpointException as error:
            self.told = True
            raise self.failed(error) from error
        return self.folder

    def failed(self, error: BaseException) -> ValueError:
        """The error to raise, after what was written is removed and what it was to replace is put back."""
        why = str(error)
        if isinstance(error, CheckpointException):  # every rank has stopped writing
            why = reasons(error)
            with self.lock, suppress(OSError):  # what is left here, the next save cleans
                if self.first and not self.undone:
                    self.undone = True
                    settle(self.folder)
        return ValueError(
            f"{self.folder} could not be saved: {why}. It is not committed, the checkpoints before it are untouched"
        )

    def ended(self, future: Future[Any]) -> None:
        """Called when an asynchronous save ends: its failure is told even if nobody ever waits for it."""
        error = future.exception()
        if error is not None:
            told = self.failed(error)
            if not self.awaited:
                tell(str(told))


def save_checkpoint(
    path: Any,
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    *,
    step: int,
    extra: dict[str, Any] | None = None,
    keep: int | None = None,
    blocking: bool = True,
) -> Save:
    """Save to `path/step_00000100`; every rank calls it, at the same step. Returns a handle with `wait()`.

    The directory is stock torch.distributed.checkpoint with the names "model" and "optim" (nested), plus
    `manifest.json` and, written when every rank has succeeded, `COMMITTED`: what lacks it is no checkpoint and is
    removed by the next save, where it was one of ours (it then holds `SAVING`). A checkpoint of the same step is
    replaced: it is `step_00000100.being_replaced` until the new one is committed, and is put back where that fails.

    extra: a dict of any JSON but without the key "step", returned by `load_checkpoint`. keep: remove all but the last
    so many, once this one is committed; what cannot be removed is a warning.
    blocking=False: the state is copied to CPU memory, then written while training goes on; one save at a time, so
    the next one first waits. All ranks need to see the same directory; collectives go through a gloo group of their
    own. ValueError for bad arguments, and, here or from `wait()`, where a save failed.
    """
    if not isinstance(path, (str, PathLike)):
        raise ValueError(f"path is a {type(path).__name__}; save_checkpoint takes the path, the model, the optimizer")
    if not isinstance(model, torch.nn.Module):
        raise ValueError(f"model is a {type(model).__name__}; save_checkpoint takes the path, the model, the optimizer")
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:
        raise ValueError(f"step is {step!r}; it must be an integer of at least 0, the number of steps done")
    if keep is not None and (isinstance(keep, bool) or not isinstance(keep, int) or keep < 1):
        raise ValueError(f"keep is {keep!r}; it must be an integer of at least 1, or None to keep all checkpoints")
    if extra is not None and not isinstance(extra, dict):
        raise ValueError(f"extra is a {type(extra).__name__}; it must be a dict, or None")
    if "step" in (extra or {}):
        raise ValueError("extra has the key 'step', under which load_checkpoint returns the step; use another name")
    try:
        extra = json.loads(json.dumps(extra or {}))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra must be JSON (dicts, lists, strings, numbers): {error}") from error
    ranks = channel()
    ranks.settle()
    model_state = get_model_state_dict(model)  # first: it makes FSDP2 put parameters in place that a forward gathered
    names, optim = optimizer_state(model, opt)
    record = {**record_of(opt, names), "step": step, "world_size": ranks.world_size, "extra": extra}
    folder = Path(path).absolute() / step_name(step)
    state = {MODEL: model_state, OPTIM: optim}
    writer = CheckpointWriter(folder, record, keep)
    options: dict[str, Any] = {"process_group": ranks.group, "no_dist": ranks.no_dist}
    quiet(ranks)
    if blocking:
        try:
            save(state, storage_writer=writer, **options)
        except CheckpointException as error:
            raise Save(folder, first=ranks.rank == 0).failed(error) from error
        return Save(folder)
    future = async_save(state, storage_writer=writer, **options)
    assert isinstance(future, Future)
    ranks.pending = Save(folder, future, ranks.rank == 0)
    return ranks.pending


def load_checkpoint(
    path: Any,
    model: torch.nn.Module,
    opt: torch.optim.Optimizer,
    *,
    step: Any = "latest",
    verify: bool | None = None,
    optim_key: str = OPTIM,
    model_key: str = MODEL,
) -> dict[str, Any] | None:
    """Load model and optimizer in place, on any mesh; returns what was saved as `extra`, with "step".

    path: a directory of steps, or one checkpoint of ours or of plain torch.distributed.checkpoint (of a torch.optim
    optimizer too, nested or flattened). Another codec than the saved one is transcoded, in buckets; another rule, or
    a switch that gives stored state its meaning (`Rule.of_state`), is a ValueError; every other option (wire, mode,
    nesterov, add-ons, rounding, the kind of decay) may change and is told in one warning. Parameters that the
    checkpoint lacks or alone has are listed in one warning; the state of the former starts fresh. Hyper-parameters of
    the groups are restored.

    step: "latest" takes the newest checkpoint whose files are intact and warns of every damaged one; None is returned
    where there is none. A number: that step or a ValueError, also where path is one checkpoint that has a manifest.
    Nothing is ever removed or written.
    verify: whether checksums are compared (sizes always are); None: where all files are below 20 GB. Nothing is
    changed when a ValueError is raised for what does not match.
    """
    if step != "latest" and (isinstance(step, bool) or not isinstance(step, int)):
        raise ValueError(f"step is {step!r}; it must be 'latest' or an integer")
    ranks, root = channel(), Path(path).absolute()
    ranks.settle()

    def load(folder: Path) -> dict[str, Any]:
        return load_folder(folder, model, opt, ranks, verify, (model_key, optim_key))

    single, found, gone = ranks.on_first(lambda: look(root, step))
    if single:
        return load(root)
    if step != "latest":
        if step not in found:
            raise ValueError(f"{root} has no checkpoint of step {step}; it has {', '.join(map(str, found)) or 'none'}")
        return load(found[step])
    if gone and ranks.rank == 0:
        names, have = ", ".join(folder.name for folder in gone), "has" if len(gone) == 1 else "have"
        instead = f"step {max(found)} is loaded instead" if found else "there is no other to load"
        tell(f"{names} in {root} {have} no {COMMITTED}, so that nothing vouches for it: {instead}")
    troubles = []
    for folder in reversed(found.values()):
        try:
            return load(folder)
        except Damaged as error:
            troubles.append(str(error))
            if ranks.rank == 0:
                tell(f"{error}. Trying the checkpoint before it")
    if troubles:
        raise ValueError(f"every checkpoint in {root} is damaged: {'; '.join(troubles)}")
    return None


def look(root: Path, step: Any) -> tuple[bool, dict[int, Path], list[Path]]:
    """(whether `root` is itself a checkpoint, else its checkpoints by step, and later ones whose marker is lost).
    ValueError where it is of another step."""
    if is_checkpoint(root):
        told = read_manifest(root) if step != "latest" else None
        if told is not None and told["step"] != step:
            raise ValueError(f"{root} is the checkpoint of step {told['step']}, not of step {step}")
        return True, {}, []
    found = committed(root)
    return False, found, [folder for at, folder in lost(root).items() if at > max(found, default=-1)]


def load_folder(
    folder: Path, model: torch.nn.Module, opt: Any, ranks: Channel, verify: bool | None, keys: tuple[str, str]
) -> dict[str, Any]:
    """Load one checkpoint. Damaged where its files are; ValueError where it is another model's or rule's."""
    opened: list[Stored] = []
    ranks.everywhere(lambda: opened.append(Stored(folder)))
    stored = opened[0]
    told = stored.manifest
    if told is None:
        return {"step": restore(stored, model, opt, ranks, keys)}
    total = sum(file["size"] for file in told["files"].values())
    checksums = total < VERIFIED_BYTES if verify is None else verify
    wrong = ranks.everywhere(lambda: damaged_files(folder, told, checksums, ranks.rank, ranks.world_size))
    if any(wrong):
        raise Damaged("; ".join(text for each in wrong for text in each))
    restore(stored, model, opt, ranks, keys)
    return {**told["extra"], "step": told["step"]}
