"""What a checkpoint says about itself, and which directories are checkpoints: manifest.json, COMMITTED, step_*.

A checkpoint is the directory `step_00000100` in the format of torch.distributed.checkpoint, plus `manifest.json`
(recipes, parameters, size and crc32 of every file, the user's `extra`) and, written last of all, `COMMITTED`, which
holds size and crc32 of the manifest. Until then the directory holds `SAVING` instead, from its first moment on, which
is how a save knows later what a crash of an earlier one has left. Beside it are, for moments, directories named
`step_00000100.being_made`, `.being_replaced` (until the new one is committed) and `.being_removed`.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from shardopt.telling import tell

FORMAT = 1
MANIFEST, COMMITTED, SAVING, METADATA = "manifest.json", "COMMITTED", "SAVING", ".metadata"
NEW, OLD, GONE = ".being_made", ".being_replaced", ".being_removed"  # names that no one gives by hand
STEP_NAME = re.compile(r"step_(\d{8,})")
BESIDE_NAME = re.compile(r"(step_\d{8,})(\.being_made|\.being_replaced|\.being_removed)")
CHUNK = 1 << 24


class Damaged(ValueError):
    """A checkpoint whose files are not what was written; an older one may do."""


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def step_folders(root: Path) -> dict[int, Path]:
    """Every step_* directory of `root` by its step, committed or not, ascending."""
    found = {}
    for entry in root.iterdir() if root.is_dir() else ():
        if (match := STEP_NAME.fullmatch(entry.name)) and entry.is_dir():
            found[int(match[1])] = entry
    return dict(sorted(found.items()))


def committed(root: Path) -> dict[int, Path]:
    """The complete checkpoints of `root` by step, ascending."""
    return {step: folder for step, folder in step_folders(root).items() if is_committed(folder)}


def is_committed(folder: Path) -> bool:
    """Whether the marker is there and was written: a crash between the two leaves an empty file."""
    marker = folder / COMMITTED
    return marker.exists() and marker.stat().st_size > 0


def lost(root: Path) -> dict[int, Path]:
    """By step, what was complete once, or copied without its marker: no save is under way there, or was cut short."""
    return {
        step: folder
        for step, folder in step_folders(root).items()
        if (folder / MANIFEST).exists() and not (folder / SAVING).exists() and not is_committed(folder)
    }


def is_checkpoint(folder: Path) -> bool:
    """Whether this directory is itself a checkpoint, ours or any of torch.distributed.checkpoint."""
    return any((folder / name).exists() for name in (METADATA, MANIFEST, COMMITTED))


def discard(folder: Path) -> None:
    """Remove a directory, the marker first: what a crash leaves of it is no checkpoint any more."""
    (folder / COMMITTED).unlink(missing_ok=True)
    shutil.rmtree(folder)


def beside(folder: Path, suffix: str) -> Path:
    return folder.with_name(folder.name + suffix)


def there(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def remove(folder: Path) -> None:
    """Remove a checkpoint, under another name first: a crash leaves it whole or gone. Of a link, the link alone."""
    if folder.is_symlink():
        return folder.unlink()
    going = folder.with_suffix(GONE)
    if going.exists():
        discard(going)
    discard(folder.rename(going))


def begin(folder: Path) -> None:
    """Make the directory of a save, which holds `SAVING` from its first moment on; what has its name is put aside."""
    clean(folder.parent)
    if there(folder):
        if (
            folder.exists()
            and not any((folder / name).exists() for name in (MANIFEST, COMMITTED))
            and any(folder.iterdir())
        ):
            raise FileExistsError(f"{folder} is there, and not shardopt's to replace; move it or remove it")
        folder.rename(beside(folder, OLD))
    new = beside(folder, NEW)
    new.mkdir(parents=True)
    write_durably(new / SAVING, b"being written\n")
    new.rename(folder)
    sync_folder(folder.parent)


def settle(folder: Path) -> None:
    """Where the save into `folder` ended, drop what it replaced; else drop what it wrote and put that back."""
    old = beside(folder, OLD)
    if is_committed(folder):
        if there(old):
            remove(old)
        return
    if (folder / SAVING).exists():
        remove(folder)
    if there(old) and not there(folder):
        old.rename(folder)


def clean(root: Path) -> None:
    """Undo saves of ours that never ended: what they wrote is removed, what they replaced is back. Nothing else."""
    names = {name.name for name in step_folders(root).values()}
    for entry in list(root.iterdir()) if root.is_dir() else ():
        if match := BESIDE_NAME.fullmatch(entry.name):
            names.add(match[1])
            if match[2] in (NEW, GONE) and not entry.is_symlink():
                with removing(entry):  # what is stuck must not fail every later save
                    discard(entry)
    for name in sorted(names):
        settle(root / name)


def prune(root: Path, keep: int, newest: Path) -> None:
    """Remove all but the last `keep` checkpoints, `newest`, just written, being one of them whatever its step."""
    others = [folder for folder in committed(root).values() if folder != newest]
    for folder in others[: max(0, len(others) + 1 - keep)]:
        with removing(folder):
            remove(folder)


@contextmanager
def removing(folder: Path) -> Iterator[None]:
    """What cannot be removed is told in a warning: no save fails for it."""
    try:
        yield
    except OSError as error:
        tell(f"{folder} could not be removed ({error}); it is left there")


def write_durably(path: Path, content: bytes) -> None:
    """Write a file and its directory entry through to the disk."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return  # a file system whose directories cannot be opened
    try:
        os.fsync(handle)
    except OSError:
        pass
    finally:
        os.close(handle)


def commit(folder: Path, manifest: Mapping[str, Any]) -> None:
    """Write the manifest, then the marker that makes the directory a checkpoint, in the place of `SAVING`."""
    content = json.dumps(manifest, indent=1).encode()
    write_durably(folder / MANIFEST, content)
    marker = {"size": len(content), "crc32": zlib.crc32(content)}
    write_durably(folder / SAVING, json.dumps(marker).encode())
    (folder / SAVING).replace(folder / COMMITTED)
    sync_folder(folder)


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest, or None for a directory that has none, of plain torch.distributed.checkpoint.

    Damaged, which names the file; ValueError for a version that this one cannot read.
    """
    if not any((folder / name).exists() for name in (MANIFEST, COMMITTED, SAVING)):
        return None
    try:
        marker = json.loads((folder / COMMITTED).read_bytes())
        size, crc = marker["size"], marker["crc32"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(
            f"{folder / COMMITTED} is missing or damaged ({error}): this is no complete checkpoint"
        ) from error
    try:
        content = (folder / MANIFEST).read_bytes()
    except OSError as error:
        raise Damaged(f"{folder / MANIFEST} cannot be read ({error})") from error
    if (len(content), zlib.crc32(content)) != (size, crc):
        raise Damaged(f"{folder / MANIFEST} (or what {COMMITTED} says of it) is damaged: it is not what was committed")
    manifest: dict[str, Any] = json.loads(content)
    if manifest["format"] > FORMAT:
        raise ValueError(
            f"{folder / MANIFEST} has format {manifest['format']}, this version of shardopt reads up to {FORMAT}; "
            "install a newer one"
        )
    return manifest


def damaged_files(
    folder: Path, manifest: Mapping[str, Any], checksums: bool, part: int = 0, parts: int = 1
) -> list[str]:
    """What is wrong with the files of a checkpoint, in words; of every `parts`-th file only, from `part` on."""
    wrong = []
    for name, expected in sorted(manifest["files"].items())[part::parts]:
        path = folder / name
        try:
            size = path.stat().st_size
            if size != expected["size"]:
                wrong.append(f"{path} has {size} bytes instead of {expected['size']}")
            elif checksums and crc_of(path) != expected["crc32"]:
                wrong.append(f"{path} is corrupt: its checksum is not the one it was written with")
        except OSError as error:
            wrong.append(f"{path} cannot be read ({error})")
    return wrong


def crc_of(path: Path) -> int:
    crc = 0
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            crc = zlib.crc32(chunk, crc)
    return crc
