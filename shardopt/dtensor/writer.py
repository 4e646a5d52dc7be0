"""Writes a checkpoint in the format of torch.distributed.checkpoint, hashing what it writes, and commits it last.

Everything that only rank 0 does happens inside the steps of DCP that reduce errors: cleaning before the plan,
committing after every rank has reported success. So a failure on any rank is known to all, and commits nothing.
"""

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.tensor import DTensor
from torch.futures import Future

from shardopt.dtensor import manifest
from shardopt.dtensor.layout import wrap


class Results(list):
    """A rank's write results, and size and crc32 of its files: travels to rank 0 with DCP's own message."""

    files: dict[str, dict[str, int]]


class HashedStream:
    """A file that is only appended to; knows size and crc32 of what went into it."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.size, self.crc32 = stream, 0, 0

    def write(self, content: Any) -> int:
        view = memoryview(content).cast("B")
        self.crc32 = zlib.crc32(view, self.crc32)
        self.size += len(view)
        return self.stream.write(view)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


class HashingFileSystem(FileSystem):
    """Remembers size and crc32 of every file written, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.files: dict[str, dict[str, int]] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[Any]:
        with super().create_stream(path, mode) as stream:
            hashed = HashedStream(stream)
            yield hashed
        self.files[Path(path).name] = {"size": hashed.size, "crc32": hashed.crc32}

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        super().rename(path, new_path)
        self.files[Path(new_path).name] = self.files.pop(Path(path).name)


class CheckpointWriter(FileSystemWriter):
    """DCP's file writer, plus a clean place to begin with, hashes, manifest, marker and pruning."""

    def __init__(self, folder: Path, record: dict[str, Any], keep: int | None) -> None:
        super().__init__(folder)
        self.fs: HashingFileSystem = HashingFileSystem()
        self.folder, self.record, self.keep = folder, record, keep
        self.coordinator = False

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy in CPU memory, so that training goes on while it is written."""
        return staged(state_dict)

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        self.coordinator = is_coordinator
        super().set_up_storage_writer(is_coordinator, *args, **kwargs)

    def prepare_local_plan(self, plan: Any) -> Any:
        if not self.coordinator:
            return plan  # rank 0 alone makes the directory: it may be removing an older one just now
        manifest.begin(self.folder)
        return super().prepare_local_plan(plan)

    def write_data(self, plan: Any, planner: Any) -> Future:
        results = Results(super().write_data(plan, planner).value())
        results.files = dict(self.fs.files)
        manifest.sync_folder(self.folder)
        done: Future = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Any, results: list[Any]) -> None:
        super().finish(metadata, results)
        files = {**self.fs.files}
        for each in results:
            files.update(each.files)
        manifest.commit(self.folder, {**self.record, "files": dict(sorted(files.items()))})
        with manifest.removing(manifest.beside(self.folder, manifest.OLD)):
            manifest.settle(self.folder)
        if self.keep is not None:
            manifest.prune(self.folder.parent, self.keep, self.folder)


def staged(value: Any) -> Any:
    """A copy of a state dict with every tensor in CPU memory of its own."""
    if isinstance(value, DTensor):
        local = copied(value._local_tensor)
        return wrap(local, value.device_mesh, tuple(value.placements), tuple(value.shape))
    if isinstance(value, Tensor):
        return copied(value)
    if isinstance(value, dict):
        return {key: staged(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(staged(item) for item in value)
    return value


def copied(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu").copy_(tensor.detach())
