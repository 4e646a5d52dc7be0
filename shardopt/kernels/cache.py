"""Compiled kernels on disk: one file per source, compiler, options and machine; made once, never half-written."""

import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any

from shardopt.telling import tell

CSRC = Path(__file__).parents[1] / "csrc"
WAIT = 300.0  # seconds for another process that builds


@cache
def cache_folder() -> Path:
    """$SHARDOPT_CACHE, else shardopt/ in $XDG_CACHE_HOME or ~/.cache; where that is read-only, one of this process."""
    chosen = os.environ.get("SHARDOPT_CACHE")
    home = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    folder = Path(chosen) if chosen else Path(home) / "shardopt"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        own = Path(tempfile.mkdtemp(prefix="shardopt-"))
        tell(
            f"shardopt cannot write compiled kernels to {folder} ({error}); this process compiles its own into {own}. "
            "Set SHARDOPT_CACHE to a folder that can be written"
        )
        return own


@cache
def sources() -> str:
    """Digest of all C++ sources."""
    digest = hashlib.sha256()
    for path in sorted(CSRC.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def name_of(*facts: str) -> str:
    """The stem of a cached file: whatever changes what is compiled changes the name."""
    return hashlib.sha256("\0".join((sources(), *facts)).encode()).hexdigest()[:24]


class NoCompiler(Exception):
    """Why nothing can be compiled on this machine; the message is a clause, for users."""


class Entry:
    """One compiled file with a note beside it that holds its checksum, what it is and how long it took."""

    def __init__(self, stem: str, suffix: str) -> None:
        self.path = cache_folder() / f"{stem}{suffix}"
        self.note = self.path.with_suffix(".json")

    def read(self) -> bytes | None:
        """The content, None where it is missing or damaged."""
        try:
            content, facts = self.path.read_bytes(), self.facts()
        except (OSError, ValueError):
            return None
        return content if facts.get("sha256") == hashlib.sha256(content).hexdigest() else None

    def facts(self) -> dict[str, Any]:
        """What the note says: seconds, compiler, the compiler's report, checksum."""
        return dict(json.loads(self.note.read_text()))

    def write(self, content: bytes, **facts: object) -> None:
        facts["sha256"] = hashlib.sha256(content).hexdigest()
        replace(self.path, content)
        replace(self.note, json.dumps(facts, indent=1).encode())


def replace(path: Path, content: bytes) -> None:
    """Atomic: a reader sees the old file or the whole new one, and a loaded library keeps its own."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".writing-")
    with os.fdopen(handle, "wb") as out:
        out.write(content)
    os.chmod(temporary, 0o755)
    os.replace(temporary, path)


@contextmanager
def building(entries: Iterable[Entry]) -> Iterator[None]:
    """Hold the locks of these entries, so that one process of a node builds each; after WAIT seconds go on without."""
    limit = time.monotonic() + WAIT
    with ExitStack() as held:
        for shard in sorted({entry.path.name[:2] for entry in entries}):  # in one order: nobody waits in a circle
            lock = held.enter_context((cache_folder() / f".lock-{shard}").open("a"))
            while not take(lock.fileno()) and time.monotonic() < limit:
                time.sleep(0.05)
        yield  # closing the files frees the locks, a crash does too


def take(handle: int) -> bool:
    try:
        import fcntl

        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except (ImportError, OSError):
        return True  # a file system without locks: renames are atomic, so that a race only builds twice
    return True


def ensure(entries: dict[str, Entry], build: Callable[[list[str]], None]) -> None:
    """Build what is missing, once a node: `build` gets the names and writes their entries."""
    if all(entry.read() is not None for entry in entries.values()):
        return
    with building(entries.values()):
        if missing := [name for name, entry in entries.items() if entry.read() is None]:
            build(missing)


def obtained(entry: Entry, build: Callable[[], None]) -> bytes:
    """The content of an entry, built if it has to be. NoCompiler where it cannot be read back."""
    ensure({"": entry}, lambda missing: build())
    content = entry.read()
    if content is None:
        raise NoCompiler(f"the compiled kernel {entry.path} cannot be read back")
    return content
