"""The command `python -m shardopt.plan`: what a step of Muon costs on a model and a mesh, without either of them."""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from math import inf
from pathlib import Path

from shardopt.dtensor.cost import Costs, units
from shardopt.dtensor.plan import LEAST_BYTES, MOST_BYTES
from shardopt.piped import quiet
from shardopt.plan.figure import draw
from shardopt.plan.forecast import WAYS, Options, forecast, mesh_of, plan_for
from shardopt.plan.models import MODELS, members_of, shapes_of
from shardopt.plan.table import heading, table
from shardopt.rules.muon import WIRES
from shardopt.spelling import in_bytes

WORDS = """Prints how Muon would exchange and orthogonalize the matrices of a model on a mesh: bytes, FLOP, buffers and
predicted seconds of every way to do it. Nothing is run; no process, GPU or network is needed."""
SHARING = {"auto": None, "yes": True, "no": False}


@quiet
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 where an argument does not fit, with the reason."""
    given = parser().parse_args(arguments)
    try:
        print(report(given))
        return 0
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    words = argparse.ArgumentParser(prog="python -m shardopt.plan", description=WORDS)
    words.add_argument("--model", required=True, help=f"{', '.join(MODELS)}, or a JSON file of name to shape")
    words.add_argument("--mesh", default="8", help="shards, or replicas x shards as in 2x8 (default %(default)s)")
    words.add_argument("--wire", default="int8", help=f"{', '.join(WIRES)}, or codecs there+back (default %(default)s)")
    modes = ("full", "gram", "auto", "local")
    words.add_argument("--mode", default="full", choices=modes, help="of the plan summed up (default %(default)s)")
    sharing = "whether replicas divide the work (default %(default)s: by predicted time)"
    words.add_argument("--share", default="auto", choices=tuple(SHARING), help=sharing)
    usual = f"a quarter of all, but {in_bytes(LEAST_BYTES)} to {in_bytes(MOST_BYTES)}"
    bound = f"bound of a rank's encoded matrices in one bucket, with room for one matrix (default: {usual})"
    words.add_argument("--bucket-bytes", type=float, metavar="BYTES", help=bound)
    words.add_argument("--period", type=int, default=5, help="steps from one full step to the next in `periodic`")
    words.add_argument("--members", action="store_true", help="list every bucket, parameter and owner")
    words.add_argument("--plot", type=Path, metavar="PNG", help="draw seconds against ranks (needs matplotlib)")
    words.add_argument("--json", action="store_true", help="print JSON in place of the table")
    costs = words.add_argument_group("what the machine can do, per rank")
    for name, unit in units().items():
        costs.add_argument(
            f"--{name.replace('_', '-')}", type=float, metavar=unit, help=f"default {getattr(Costs(), name):g}"
        )
    costs.add_argument("--measured", action="store_true", help="the numbers given here were measured, not assumed")
    return words


def options_of(given: argparse.Namespace) -> Options:
    numbers = {name: getattr(given, name) for name in units() if getattr(given, name) is not None}
    costs = Costs(**numbers, measured=tuple(numbers) if given.measured else ())
    if given.period < 1:
        raise ValueError(f"--period {given.period}: must be at least 1")
    size = given.bucket_bytes
    if size is not None and not 1 <= size < inf:
        raise ValueError(f"--bucket-bytes {size}: must be at least 1, and finite")
    return Options(share=SHARING[given.share], bucket_bytes=size and int(size), period=given.period, costs=costs)


def report(given: argparse.Namespace) -> str:
    """What to print; draws the figure where one is asked."""
    mesh, options, shapes = mesh_of(given.mesh), options_of(given), shapes_of(given.model)
    members = members_of(shapes, mesh.shards, given.wire)
    made = plan_for(given.mode, members, mesh, options)
    rows = [forecast(way, members, mesh, options) for way in WAYS]
    if given.plot:
        draw(given.plot, given.model, shapes, mesh.replicas, given.wire, options)
    if given.json:
        plan = {"digest": made.digest(), "shared": made.shared, "buckets": len(made.buckets), "least": made.least}
        chosen = {"model": given.model, "mesh": str(mesh), "wire": given.wire, "mode": given.mode}
        found = {**chosen, "plan": plan, "costs": asdict(options.costs), "ways": [asdict(row) for row in rows]}
        return json.dumps(found, indent=1)
    text = table(heading(given.model, mesh, given.wire), made, rows, options)
    return f"{text}\n\n{made.describe(list(shapes))}" if given.members else text


if __name__ == "__main__":
    sys.exit(main())
