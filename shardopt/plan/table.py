"""The forecasts of a model on a mesh, as text."""

from collections.abc import Sequence

from shardopt.dtensor.plan import Plan
from shardopt.plan.forecast import Forecast, Mesh, Options

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
    lines.append(f"{'way':11}{'sent a rank':>13}{'FLOPs a rank':>14}{'busiest':>9}{'buffers':>10}{'a step':>12}")
    for row in rows:
        note = NOTES[row.way].format(period=options.period) + (", shared by replicas" if row.shared else "")
        lines.append(
            f"{row.way:11}{size(row.sent):>13}{row.flops:>14.3g}{row.balance:>9.3f}{size(row.buffers):>10}"
            f"{duration(row.seconds):>12}  {note}"
        )
    return "\n".join([*lines, "", "predicted with, per rank:", options.costs.describe()])


def heading(model: str, mesh: Mesh, wire: str) -> str:
    kind = f"{mesh.replicas} replicas x {mesh.shards} shards" if mesh.replicas > 1 else f"{mesh.shards} shards"
    return f"{model} on {kind}, wire {wire}"


def duration(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms" if seconds < 1 else f"{seconds:.3f} s"


def size(number: float) -> str:
    """Bytes, to three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
