"""Instructions an element of the GPU's kernels, counted in the machine code: no GPU needed, nothing is timed.

    python -m benchmarks.sass [--arch sm_90] [--listing int8]

What is counted is one turn of the loop over calm tiles, from its first instruction to the branch back: 256 elements by
a warp, 8 a lane, so that the figure is instructions / 8. Where paths part, the longest counts, but for two: what some
lanes do by themselves (a branch to the end of its BSSY region skips it), which is the exact encoding of what is in
doubt, and leaving the loop. Needs nvdisasm (`$NVDISASM`, the path, or a package that brings it).
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from shardopt import Recipe
from shardopt.kernels import cuda, key_at
from shardopt.kernels.key import Key
from shardopt.rules import AdamW, Lion

RESULT = Path(__file__).parent / "results" / "sass.json"
BF16 = torch.bfloat16
RECIPES = {
    "int8": Recipe(AdamW(), "int8", ("cautious_decay",), "stochastic"),
    "int4": Recipe(AdamW(), "int4", ("cautious_decay",), "stochastic"),
    "lion": Recipe(Lion(), "int8", ("cautious_decay",), "stochastic"),
}
E = 8  # elements of a lane


class Instruction(NamedTuple):
    """predicated: whether a predicate decides if it is done; target: of a branch, an index."""

    name: str
    predicated: bool
    target: str
    text: str


class Code(NamedTuple):
    instructions: list[Instruction]
    labels: dict[str, int]


def nvdisasm() -> str:
    found = os.environ.get("NVDISASM") or shutil.which("nvdisasm")
    brought = [p for entry in sys.path if entry for p in Path(entry).glob("[nt]*/**/bin/nvdisasm")] if not found else []
    if not found and not brought:
        raise SystemExit("nvdisasm is not found: pip install nvidia-cuda-nvdisasm, or set $NVDISASM")
    return found or str(brought[0])


def disassembled(cubin: bytes) -> Code:
    """The machine code of shardopt_step."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([nvdisasm(), "-c", file.name], capture_output=True, text=True, check=True).stdout
    body = text[text.index(".text.shardopt_step:") :]
    code = Code([], {})
    for line in body.splitlines():
        if match := re.match(r"(\.L_x_\d+):", line):
            code.labels[match.group(1)] = len(code.instructions)
        elif match := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?U?P\w+ )?\s*([A-Z]\S*)(.*?);", line):
            target = re.search(r"`\((\.L_x_\d+)\)", match.group(3))
            name = match.group(2)
            partly = bool(match.group(1)) or bool(re.match(r" !?U?P\d", match.group(3)) and name.startswith("BRA"))
            code.instructions.append(Instruction(name, partly, target.group(1) if target else "", line.strip()))
        elif line.startswith("\t.section"):
            break
    return code


def loop_of(code: Code) -> tuple[int, int]:
    """First and last instruction of the loop over whole tiles: the shortest one that stores and begins anew."""
    loops = []
    for last, one in enumerate(code.instructions):
        first = code.labels.get(one.target, last + 1)
        if one.name.startswith("BRA") and one.predicated and first < last:
            names = Counter(x.name.split(".")[0] for x in code.instructions[first:last])
            if names["STG"] >= 2 and names["LDG"] >= 3 and names["VOTE"] + names["VOTEU"] >= 1:
                loops.append((last - first, first, last))
    if not loops:
        raise SystemExit("no loop over whole tiles: the key has none")
    return min(loops)[1:]


def turn(code: Code, first: int, last: int) -> list[Instruction]:
    """The instructions of one turn, see above."""
    sys.setrecursionlimit(100_000)

    @cache
    def best(at: int, ends: tuple[str, ...]) -> tuple[int, tuple[int, ...]] | None:
        """(length, the branches taken) of the longest way from `at` to `last`; ends: of the BSSY regions it is in."""
        length = 0
        while at != last:
            if not first <= at <= last:
                return None
            one, length = code.instructions[at], length + 1
            base = one.name.split(".")[0]
            if base == "BSSY":
                ends = (*ends, one.target)
            elif base == "BSYNC":
                ends = ends[:-1]
            elif base in ("EXIT", "RET"):
                return None
            elif base == "BRA" and one.name != "BRA.DIV":
                to = code.labels[one.target]
                skips = bool(ends) and to in (code.labels[ends[-1]] - 1, code.labels[ends[-1]])  # the BSYNC, or beyond
                ways = [(at, to)] if skips or not one.predicated else [(at, to), (-1, at + 1)]
                found = []
                for taken, follow in ways:
                    if follow > at and (rest := best(follow, ends)):
                        found.append((length + rest[0], ((taken,) if taken >= 0 else ()) + rest[1]))
                return max(found, default=None)
            at += 1
        return length + 1, ()

    found = best(first, ())
    assert found is not None, "no way through the loop"
    taken, at, way = set(found[1]), first, []
    while True:
        way.append(code.instructions[at])
        if at == last:
            return way
        at = code.labels[code.instructions[at].target] if at in taken else at + 1


UNITS = {  # what an instruction is, by the beginning of its name
    "special functions and conversions": ("MUFU", "I2F.", "F2I", "F2F"),
    "float": ("FMUL", "FADD", "FFMA", "FMNMX", "FSET", "FSEL", "HFMA", "HADD", "I2FP", "D"),
    "memory": ("LD", "ST"),
    "control": ("BRA", "BSSY", "BSYNC", "VOTE", "WARPSYNC", "REDUX", "SHFL", "NOP"),
}


def facts_of(key: Key, arch: str, fast: bool) -> tuple[dict[str, object], list[Instruction]]:
    cubin = cuda.compiled(key, arch, fast)
    code = disassembled(cubin)
    way = turn(code, *loop_of(code))
    units = Counter(
        next((unit for unit, starts in UNITS.items() if one.name.startswith(starts)), "integer") for one in way
    )
    report = cuda.entry_of(key, arch, fast).facts()["report"]
    return {
        "instructions": round(len(way) / E, 2),
        **{unit: round(units[unit] / E, 2) for unit in (*UNITS, "integer")},
        "loads and stores of 16 bytes": sum(one.name.startswith(("LDG", "STG")) and ".128" in one.name for one in way),
        "local memory": sum(one.name.startswith(("LDL", "STL")) for one in code.instructions),
        **{name: report[name] for name in ("registers", "spill_stores", "spill_loads", "stack")},
    }, way


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--arch", default="sm_90")
    parser.add_argument("--listing", choices=RECIPES, help="print the loop of one instead")
    options = parser.parse_args()
    found: dict[str, object] = {}
    for name, recipe in RECIPES.items():
        key = key_at(recipe, (4096, 4096), BF16, BF16)
        for mode in ("fast", "exact"):
            facts, way = facts_of(key, options.arch, mode == "fast")
            if options.listing:
                if (name, mode) == (options.listing, "fast"):
                    print("\n".join(one.text for one in way))
                continue
            found[f"{name} {mode}"] = facts
            print(f"{name} {mode}: {json.dumps(facts)}")
    if found:
        version = ".".join(map(str, cuda.bindings()[2]))
        RESULT.write_text(json.dumps({"arch": options.arch, "NVRTC": version, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
