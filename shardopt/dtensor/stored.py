"""A checkpoint as it lies on disk: which tensors and values it holds, and how its optimizer state is stored."""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, load
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from shardopt.codecs import CODECS, FIXED, Codec, codec
from shardopt.dtensor.channel import Channel
from shardopt.dtensor.manifest import METADATA, Damaged, read_manifest
from shardopt.state import part_name

BLOCKS = tuple(2**k for k in range(3, 17))


class Stored:
    """One checkpoint directory: its manifest (None for a foreign one) and the metadata of all its entries.

    entries: flattened name -> TensorStorageMetadata or BytesStorageMetadata. Damaged where it cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        try:
            self.entries: Mapping[str, Any] = FileSystemReader(folder).read_metadata().state_dict_metadata
        except Exception as error:  # a damaged pickle raises anything
            raise Damaged(f"{folder / METADATA} cannot be read ({type(error).__name__}: {error})") from error

    def read(self, wanted: dict[str, Any], channel: Channel) -> dict[str, Any]:
        """Read entries by name: into the tensors given, in place; other values are returned. All ranks together.

        Damaged where a file cannot be read.
        """
        if not wanted:
            return {}
        quiet(channel)
        wanted = dict(wanted)
        reader = FileSystemReader(self.folder)
        try:
            load(wanted, storage_reader=reader, process_group=channel.group, no_dist=channel.no_dist)
        except CheckpointException as error:
            raise Damaged(f"{self.folder} cannot be loaded: {reasons(error)}") from error
        return wanted

    def values(self, names: Iterable[str], channel: Channel) -> dict[str, Any]:
        """Entries that are numbers, strings or small tensors, by name."""
        return self.read({name: self.blank(name) for name in names}, channel)

    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """(shape, dtype) of every entry that is a tensor."""
        found = {name: self.tensor(name) for name in self.entries}
        return {name: both for name, both in found.items() if both is not None}

    def blank(self, name: str) -> Any:
        entry = self.entries[name]
        if isinstance(entry, TensorStorageMetadata):
            return torch.empty(entry.size, dtype=entry.properties.dtype)
        return None

    def tensor(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """(global shape, dtype) of an entry; None where there is no such tensor."""
        entry = self.entries.get(name)
        return (tuple(entry.size), entry.properties.dtype) if isinstance(entry, TensorStorageMetadata) else None

    def holds(self, prefix: str, slot: str, stored: Codec, shape: tuple[int, ...], view: tuple[int, ...]) -> bool:
        """Whether every part of a slot is there as this codec stores it; a bare slot may be any floating type."""
        for part in stored.parts(view):
            found = self.tensor(prefix + part_name(slot, part.suffix))
            if found is None or found[0] != part.shape(shape, view):
                return False
            if found[1] != part.dtype and (part.suffix or not found[1].is_floating_point):
                return False
        return True

    def codec_of(
        self, prefix: str, slot: str, signed: bool, shape: tuple[int, ...], view: tuple[int, ...], told: str | None
    ) -> Codec | None:
        """How a slot is stored: as the manifest has `told`, else as the names, shapes and dtypes of its parts tell."""
        candidates = [codec(told)] if told else [cls() for cls in (CODECS | FIXED).values()]
        if not told:
            blocked = [cls for cls in CODECS.values() if "block" in cls.__dataclass_fields__]
            candidates += [codec(f"{cls.name}(block={block})") for cls in blocked for block in BLOCKS]
        for candidate in candidates:
            if candidate.signed if signed else candidate.non_negative:
                settled = candidate.for_slot(signed)
                if self.holds(prefix, slot, settled, shape, view):
                    return settled
        return None

    def top_level(self) -> list[str]:
        return sorted({name.split(".", 1)[0] for name in self.entries})


def quiet(channel: Channel) -> None:
    """DCP warns of every save and load without a process group, which here is on purpose."""
    if channel.no_dist:
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def reasons(error: CheckpointException) -> str:
    """What failed on which rank, in one line: the exception's own text is a page of tracebacks."""
    told = {rank: failure[0] if isinstance(failure, tuple) else failure for rank, failure in error.failures.items()}
    return "; ".join(f"rank {rank}: {type(failure).__name__}: {failure}" for rank, failure in told.items())


def put(target: Tensor, content: Tensor) -> None:
    """Copy into the local storage that is there."""
    local = getattr(target, "_local_tensor", target)
    local.copy_(content.reshape(local.shape))
