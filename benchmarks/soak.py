"""Draws from the full product of rules, formats, add-ons, writes, dtypes, shapes and meshes, for some minutes.

    python -m benchmarks.soak --minutes 30

CI walks a pairwise cover of the same table (tests/test_virtual.py); this is the rest. Every case compares two meshes
with the unsharded run, five steps, parameters and every stored part. Failures are printed with what reproduces them.
"""

import argparse
import json
import random
import time
from pathlib import Path

import torch

from tests.table import FACTORS, FLIPS, Case, excluded
from tests.test_virtual import compare, meshes_for, run_case

RESULTS = Path(__file__).parent / "results" / "soak.json"


def draw(source: random.Random) -> Case:
    while True:
        case = Case(*(source.choice(entries) for entries in FACTORS))
        if not excluded(case.rule, case.addons):
            return case


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(1)
    source = random.Random(options.seed)
    counts = {"cases": 0, "meshes": 0, "exact": 0, "values": 0, "differing": 0}
    failures: list[str] = []
    end = time.monotonic() + 60 * options.minutes
    while time.monotonic() < end:
        case = draw(source)
        whole = run_case(case)
        for mesh in meshes_for(case, source.randrange(100)):
            cut = run_case(case, mesh)
            try:
                differing, total = compare(whole, cut, exact=not whole.sums)
                assert differing <= max(1, FLIPS * total), f"{differing} of {total} codes differ"
                counts["values"] += total
                counts["differing"] += differing
            except AssertionError as error:
                failures.append(f"{case} on {mesh}: {error}")
                print(failures[-1], flush=True)
            counts["meshes"] += 1
            counts["exact"] += not whole.sums
        counts["cases"] += 1
    result = {
        "minutes": options.minutes,
        "seed": options.seed,
        "torch": torch.__version__,
        **counts,
        "failures": failures,
    }
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    raise SystemExit(bool(failures))


if __name__ == "__main__":
    main()
