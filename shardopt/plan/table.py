"""The forecasts of a model on a mesh, as text."""

from collections.abc import Sequence

from shardopt.dtensor.plan import Plan
from shardopt.plan.forecast import Forecast, Mesh, Options
from shardopt.spelling import counted, in_bytes

NOTES = {
    "all-gather": "every rank orthogonalizes everything",
    "full": "one owner a matrix",
    "gram": "pieces stay, Gram matrices are summed",
    "auto": "full or gram, whichever is shorter",
    "periodic": "local, full every {period} steps: another algorithm",
    "local": "every rank its piece: another algorithm, unless pieces are matrices",
}


def table(title: str, made: Plan, rows: Sequence[Forecast], options: Options) -> str:
    """Title, the plan in a few lines, one line a way, and the costs that were assumed."""
    lines = [title, "", made.summary(), ""]
    lines.append(f"{'way':11}{'sent a rank':>13}{'FLOP a rank':>13}{'busiest/mean':>14}{'buffers':>10}{'a step':>12}")
    for row in rows:
        note = NOTES[row.way].format(period=options.period) + (", shared by replicas" if row.shared else "")
        lines.append(
            f"{row.way:11}{in_bytes(row.sent):>13}{row.flops:>13.3g}{row.balance:>14.3f}{in_bytes(row.buffers):>10}"
            f"{duration(row.seconds):>12}  {note}"
        )
    lines += [
        "",
        "sent, FLOP: means of all ranks; buffers: of three buckets; a step: exchange and orthogonalization alone",
    ]
    return "\n".join([*lines, "", "predicted with, per rank:", options.costs.describe()])


def heading(model: str, mesh: Mesh, wire: str) -> str:
    replicas = f"{mesh.replicas} replicas x " if mesh.replicas > 1 else ""
    kind = f"{replicas}{counted(mesh.shards, 'shard')}"
    return f"{model} on {kind}, wire {wire}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.3f} s"
