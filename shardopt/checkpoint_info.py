"""Prints what a checkpoint holds: recipes, slots, dtypes, bytes a parameter, sizes; no process group, no model."""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from math import prod
from pathlib import Path
from typing import Any

from shardopt.dtensor.manifest import committed, damaged_files, is_checkpoint
from shardopt.dtensor.stored import Stored
from shardopt.piped import quiet


@quiet
def main(arguments: Sequence[str] | None = None) -> int:
    """The console command. Returns 0; 1 where the checkpoint is damaged; 2 where there is none."""
    parser = argparse.ArgumentParser(prog="shardopt-checkpoint-info", description=__doc__)
    parser.add_argument("path", type=Path, help="a checkpoint, or a directory of step_* (the newest is shown)")
    parser.add_argument("--verify", action="store_true", help="compare the checksums of all files too")
    options = parser.parse_args(arguments)
    try:
        return show(options.path, options.verify)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1


def show(path: Path, verify: bool) -> int:
    folder = path
    if not is_checkpoint(path):
        found = committed(path)
        if not found:
            print(f"{path} is no checkpoint and has none; give a directory of step_* or one of them", file=sys.stderr)
            return 2
        print(f"{path}: committed steps {', '.join(map(str, found))}")
        folder = list(found.values())[-1]
    stored = Stored(folder)
    manifest = stored.manifest
    wrong = damaged_files(folder, manifest, verify) if manifest else []
    print("\n".join(lines(stored, manifest or {})))
    if manifest:
        print("files: " + ("DAMAGED" if wrong else "sizes and checksums verified" if verify else "sizes verified"))
    print("\n".join(wrong), end="\n" if wrong else "", file=sys.stderr)
    return 1 if wrong else 0


def lines(stored: Stored, manifest: dict[str, Any]) -> list[str]:
    """The report, line by line."""
    tensors = {
        name: (shape, str(dtype).removeprefix("torch."), prod(shape) * dtype.itemsize)
        for name, (shape, dtype) in stored.tensors().items()
    }
    known = set(manifest.get("parameters", ()))
    state: dict[str, dict[str, tuple[str, int]]] = defaultdict(dict)  # parameter -> part -> (dtype, bytes)
    plain: dict[str, tuple[tuple[int, ...], str, int]] = {}
    for name, (shape, dtype, size) in tensors.items():
        section, _, rest = name.partition(".state.")
        owner = owner_of(rest, known or {n.partition(".")[2] for n in tensors if ".state." not in n})
        if rest and owner:
            state[owner][rest[len(owner) + 1 :]] = (dtype, size)
        elif not section.endswith("param_groups") and ".param_groups." not in name:
            plain[name] = (shape, dtype, size)
    out = [f"{stored.folder}"]
    if manifest:
        out[0] += f": step {manifest['step']}, format {manifest['format']}, torch {manifest['torch']}, "
        out[0] += f"saved by {manifest['world_size']} rank(s)"
        for number, recipe in enumerate(manifest["recipes"]):
            what = recipe.get("key") or recipe.get("optimizer")
            out.append(f"group {number}: {what}, {len(recipe['params'])} parameters")
        if manifest["extra"]:
            out.append(f"extra: {json.dumps(manifest['extra'])[:500]}")
    else:
        out[0] += ": plain torch.distributed.checkpoint, without a manifest"
    out += table(plain, state)
    if manifest:
        files = manifest["files"]
        out.append(f"{len(files)} files, {mega(sum(file['size'] for file in files.values()))}")
    return out


def table(
    plain: dict[str, tuple[tuple[int, ...], str, int]], state: dict[str, dict[str, tuple[str, int]]]
) -> list[str]:
    """Model entries with the state of each, then the totals."""
    out = ["", "parameter  shape  dtype  state: part dtype ...  B/param"]
    numbers = bytes_ = 0
    for name, (shape, dtype, _) in plain.items():
        parts = next((state[owner] for owner in state if name == owner or name.endswith(f".{owner}")), {})
        count, size = max(1, prod(shape)), sum(size for _, size in parts.values())
        text = ", ".join(f"{part} {kind}" for part, (kind, _) in parts.items()) or "-"
        out.append(f"{name}  {'x'.join(map(str, shape)) or '()'}  {dtype}  {text}  {size / count:.3f}")
        if parts:
            numbers, bytes_ = numbers + prod(shape), bytes_ + size
    out.append("")
    out.append(f"model {mega(sum(size for *_, size in plain.values()))}, optimizer state {mega(bytes_)}")
    if numbers:
        out[-1] += f": {bytes_ / numbers:.3f} B/param over {numbers:,} parameters"
    return out


def owner_of(rest: str, known: set[str]) -> str:
    """The longest known parameter name that begins `name.part`."""
    words = rest.split(".")
    for end in range(len(words) - 1, 0, -1):
        if (name := ".".join(words[:end])) in known:
            return name
    return ""


def mega(size: int) -> str:
    return f"{size / 1e6:.3f} MB"


if __name__ == "__main__":
    sys.exit(main())
