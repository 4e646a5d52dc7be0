"""Draws predicted seconds of a step against ranks, one line a way to orthogonalize; needs matplotlib."""

from math import prod
from pathlib import Path
from typing import Any

from shardopt.plan.forecast import Forecast, Mesh, Options, forecast
from shardopt.plan.models import Shapes, members_of

RANKS = tuple(2**k for k in range(13))
LINES: tuple[
    tuple[str, str, str, str, dict[str, Any]], ...
] = (  # way, wire ("" for the one asked), label, colour, style
    ("all-gather", "", "all-gather, every rank everything", "#888888", {"linestyle": "--"}),
    ("gram", "", "Gram, pieces stay", "#cc7722", {"linestyle": "-."}),
    ("full", "", "one owner a matrix, {wire}", "#1f5fa8", {"marker": "o"}),
    ("full", "int8+int4", "one owner a matrix, int8+int4", "#4aa3df", {"marker": "s"}),
    ("periodic", "", "periodic, full every {period} steps*", "#6a4c93", {"linestyle": ":"}),
    ("local", "", "local pieces*", "#2e8b57", {"linestyle": ":"}),
)


def sweep(shapes: Shapes, replicas: int, wire: str, way: str, options: Options) -> list[Forecast]:
    """Forecasts of one way over RANKS, as many as have a shard for every replica."""
    meshes = [Mesh(shards=ranks // replicas, replicas=replicas) for ranks in RANKS if ranks >= replicas]
    return [forecast(way, members_of(shapes, mesh.shards, wire), mesh, options) for mesh in meshes]


def draw(path: Path, model: str, shapes: Shapes, replicas: int, wire: str, options: Options) -> None:
    """Write the figure to `path`."""
    try:
        import matplotlib
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    ranks = [ranks for ranks in RANKS if ranks >= replicas]
    for way, other, label, colour, style in LINES:
        if other == wire:
            continue
        seconds = [row.seconds * 1e3 for row in sweep(shapes, replicas, other or wire, way, options)]
        label = label.format(wire=wire, period=options.period)
        axes.plot(ranks, seconds, label=label, color=colour, linewidth=1.6, markersize=4, **style)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(lambda x, _: f"{x:,.3g}" if x < 1e3 else f"{x:,.0f}")
    axes.set_xticks(ranks, [f"{count:,}" for count in ranks])
    matrices = sum(prod(shape[:-2]) for shape in shapes.values())
    if matrices <= ranks[-1]:
        axes.axvline(matrices, color="#bbbbbb", linewidth=0.8, zorder=0)
        words = f" {matrices} matrices: more ranks\n than this find no work"
        axes.text(matrices, 0.78, words, transform=axes.get_xaxis_transform(), va="top", fontsize=8, color="#777777")
    axes.set_xlabel("ranks" + (f" ({replicas} replicas)" if replicas > 1 else " (all of them shards)"))
    axes.set_ylabel("predicted ms a step, orthogonalization and exchange")
    axes.set_title(f"Muon on {model}")
    axes.grid(True, which="major", linewidth=0.4, alpha=0.5)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(title="* another algorithm", frameon=False, fontsize=9, title_fontsize=8, alignment="left")
    try:
        figure.savefig(path, dpi=110)
    except OSError as error:
        raise ValueError(f"--plot {path}: cannot be written ({error.strerror})") from error
    finally:
        plt.close(figure)
