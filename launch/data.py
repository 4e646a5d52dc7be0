"""Tokens from real text, and an order of them that is a function of (seed, step, index) and of no rank or state."""

from __future__ import annotations

import hashlib
import math
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .config import Config

# Tests repeat themselves and are absent on some machines; installed packages differ between all of them.
LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Corpus:
    train: np.ndarray[Any, Any]  # tokens, uint8 or uint16
    val: np.ndarray[Any, Any]
    hash: str
    name: str


def text_files(folder: Path, pattern: str) -> list[Path]:
    found = (path for path in folder.rglob(pattern) if path.is_file())
    kept = (path for path in found if not LEFT_OUT & set(path.relative_to(folder).parts[:-1]))
    return sorted(kept, key=lambda path: path.relative_to(folder).as_posix())


def is_validation(relative: str, fraction: float) -> bool:
    """By a hash of the path, so that a file stays on its side when others come and go."""
    return int.from_bytes(hashlib.sha256(relative.encode()).digest()[:4], "little") < fraction * 2**32


def read_folder(folder: Path, pattern: str, fraction: float) -> Corpus:
    digest, sides = hashlib.sha256(), ([], [])  # type: tuple[Any, tuple[list[bytes], list[bytes]]]
    for path in text_files(folder, pattern):
        relative, text = path.relative_to(folder).as_posix(), path.read_bytes()
        digest.update(f"{relative}\0{len(text)}\0".encode() + text)
        sides[is_validation(relative, fraction)].append(text)
    train, val = (np.frombuffer(b"".join(side), dtype=np.uint8) for side in sides)
    return Corpus(train, val, digest.hexdigest()[:16], f"{folder.name}/**/{pattern}")


def read_bin(path: Path, dtype: str, fraction: float) -> Corpus:
    """A memory map; its hash looks at the size and 64 pages, since reading all of a large file takes minutes."""
    tokens = np.memmap(path, dtype=dtype, mode="r")
    digest = hashlib.sha256(f"{dtype} {len(tokens)}".encode())
    for start in np.linspace(0, max(len(tokens) - 4096, 0), 64).astype(int):
        digest.update(tokens[start : start + 4096].tobytes())
    cut = len(tokens) - int(len(tokens) * fraction)
    return Corpus(tokens[:cut], tokens[cut:], digest.hexdigest()[:16], path.name)


def load(config: Config) -> Corpus:
    path = Path(config.data or sysconfig.get_path("stdlib"))
    if path.is_dir():
        corpus = read_folder(path, config.glob or ("*" if config.data else "*.py"), config.val_fraction)
    elif path.suffix == ".bin" and path.is_file():
        corpus = read_bin(path, config.token_dtype, config.val_fraction)
    else:
        raise ValueError(f"data {str(path)!r} is neither a folder of text files nor a .bin token file")
    for side, tokens in (("training", corpus.train), ("validation", corpus.val)):
        if len(tokens) <= config.context:
            raise ValueError(
                f"{corpus.name}: {len(tokens)} {side} tokens are too few for a context of {config.context}"
            )
    return corpus


def mix64(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """splitmix64's finaliser: our own, since numpy may change its streams between versions."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def offsets(seed: int, step: int, indices: range, span: int) -> np.ndarray[Any, Any]:
    """Where the sequences `indices` of the global batch of `step` begin: integers in [0, span)."""
    key = mix64(mix64(np.full(1, seed, np.uint64) + np.uint64(0x9E3779B97F4A7C15)) + np.uint64(step))
    return (mix64(key + np.arange(indices.start, indices.stop, dtype=np.uint64)) % np.uint64(span)).astype(np.int64)


def share(count: int, rank: int, world: int) -> range:
    """The consecutive part of `count` sequences that is this rank's; sizes differ by at most one and may be zero."""
    return range(rank * count // world, (rank + 1) * count // world)


def rounds(count: int, world: int, micro: int) -> int:
    """Passes every rank makes, so that all ranks meet in the same collectives."""
    return math.ceil(math.ceil(count / world) / micro) if micro else 1


def windows(tokens: np.ndarray[Any, Any], starts: np.ndarray[Any, Any], context: int) -> Tensor:
    """(len(starts), context + 1) int64."""
    rows = [tokens[start : start + context + 1].astype(np.int64) for start in starts]
    return torch.from_numpy(np.stack(rows)) if rows else torch.zeros(0, context + 1, dtype=torch.int64)


def train_batch(tokens: np.ndarray[Any, Any], config: Config, step: int, rank: int, world: int) -> Tensor:
    mine = share(config.global_batch, rank, world)
    return windows(tokens, offsets(config.seed, step, mine, len(tokens) - config.context), config.context)


def eval_batch(tokens: np.ndarray[Any, Any], config: Config, index: int, rank: int, world: int) -> Tensor:
    """This rank's share of evaluation batch `index`: windows evenly over the validation text, always the same."""
    mine = share(config.global_batch, rank, world)
    span, total = len(tokens) - config.context - 1, config.eval_batches * config.global_batch
    places = np.arange(mine.start, mine.stop) + index * config.global_batch
    return windows(tokens, places * span // max(total - 1, 1), config.context)
