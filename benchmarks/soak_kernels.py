"""Kernels against the reference on cases drawn from the full product of the table: what the tests' cover leaves out.

    python -m benchmarks.soak_kernels --minutes 5

Every case is stepped three times by both; parameters and every stored part are compared bit by bit. Most of the time
goes into compiling: nearly every case is a kernel of its own.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import torch

from shardopt.kernels import NoTwin, key_at
from tests.kernel_kit import GRADIENTS, differences, stepped
from tests.table import DTYPES, FACTORS, Case

RESULT = Path(__file__).parent / "results" / "soak_kernels.json"


def drawn(draw: random.Random) -> tuple[Case, torch.dtype] | None:
    """A case that has a twin, with a gradient's dtype; None where this draw has none."""
    case = Case(*(draw.choice(entries) for entries in FACTORS))._replace(source="fresh")
    dtype = DTYPES[case.dtype]
    gradient = draw.choice(GRADIENTS[dtype])
    try:
        key_at(case.recipe(), case.shape, dtype, gradient)
    except (NoTwin, ValueError):
        return None
    return case, gradient


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, limit = random.Random(options.seed), time.monotonic() + 60 * options.minutes
    seen: set[Any] = set()
    found: list[dict[str, Any]] = []
    compared = 0
    while time.monotonic() < limit:
        case = drawn(draw)
        if case is None or case in seen:
            continue
        seen.add(case)
        runs = [stepped(*case, fused=fused, steps=3) for fused in (False, True)]
        compared += sum(tensor.numel() for tensor in runs[0].values())
        if unequal := differences(*runs):
            found.append(
                {"case": case[0].name(), "gradient": str(case[1]), "differences": [d._asdict() for d in unequal]}
            )
            print(found[-1], flush=True)
    result = {
        "minutes": options.minutes,
        "seed": options.seed,
        "torch": torch.__version__,
        "cases": len(seen),
        "values": compared,
        "unequal_values": sum(d["elements"] for row in found for d in row["differences"]),
        "cases_that_differ": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({**result, "cases_that_differ": len(found)}, indent=1))


if __name__ == "__main__":
    main()
