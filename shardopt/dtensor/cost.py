"""What whole-matrix orthogonalization costs: FLOPs of a matrix, seconds of products and exchanges, as plain formulas.

r = min(rows, cols), L = max(rows, cols), five steps. A symmetric result costs half a product. Everything is built
from +, * and / in one order, so that equal inputs give equal bits on every rank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

KERNELS = 17  # launches of one batch: 3 products a step, the norm, the casts
TRAFFIC = 12  # bytes of device memory an element, Gram form
GRAM_BYTES = 4  # float32


def orthogonalize_flops(rows: int, cols: int) -> float:
    """FLOPs of one matrix in the Gram form with one restart: plain Newton-Schulz, 15 r^2 L + 5 r^3, is never less."""
    return gram_flops(rows, cols, 1)


def gram_flops(rows: int, cols: int, shards: int) -> float:
    """FLOPs a rank when the long side stays cut: products along it are shared, those of r x r are repeated."""
    r, long = min(rows, cols), max(rows, cols)
    return 6 * r * r * long / shards + 14 * r**3


def given(default: float, unit: str, source: str) -> Any:
    return field(default=default, metadata={"unit": unit, "source": source})


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What the machine can do; per rank. `measured` names the fields that were measured on it, the rest are given."""

    gemm_flops: float = given(6e14, "FLOP/s", "published 5.5e14 to 6e14 on H100, 16-bit symmetric products")
    memory_bandwidth: float = given(3.35e12, "B/s", "H100 SXM data sheet")
    launch: float = given(4e-6, "s", "a kernel launch from Python, typical")
    bandwidth_in: float = given(4e11, "B/s", "NVLink 4, 4.5e11 each way less protocol; poor packing reached a tenth")
    bandwidth_out: float = given(5e10, "B/s", "one 400 Gb/s adapter a rank")
    latency: float = given(5e-6, "s", "a message between two ranks, typical")
    peers: int = given(64, "messages", "above this many, messages of one rank overlap")
    ranks_per_node: int = given(8, "ranks", "DGX H100")
    measured: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        numbers = {entry.name: getattr(self, entry.name) for entry in fields(self) if entry.name != "measured"}
        for name, value in numbers.items():
            least = 0 if name in ("launch", "latency") else 1
            if not value >= least:
                raise ValueError(f"Costs({name}={value}): must be at least {least}, in {units()[name]}")
        if strangers := [name for name in self.measured if name not in numbers]:
            raise ValueError(f"Costs(measured={self.measured}): no such field {strangers}; there are {list(numbers)}")

    def words(self) -> str:
        """What the machine is taken to do, and how that is known."""
        known = "measured" if self.measured else "given, not measured here"
        return (
            f"{self.gemm_flops:.2g} FLOP/s, {self.memory_bandwidth:.3g} B/s of memory, {self.bandwidth_in:.2g} B/s in "
            f"a node and {self.bandwidth_out:.2g} out of it ({known})"
        )

    def compute(self, flops: float, elements: float, batches: int = 1) -> float:
        """Seconds of products: bound by arithmetic, by memory or by launches."""
        arithmetic, traffic = flops / self.gemm_flops, TRAFFIC * elements / self.memory_bandwidth
        return max(arithmetic, traffic, batches * KERNELS * self.launch)

    def all_to_all(self, volume: float, ranks: int) -> float:
        """Seconds until the rank with most to send or receive has exchanged `volume` bytes, its own part included."""
        if ranks == 1:
            return 0.0
        inside = (min(self.ranks_per_node, ranks) - 1) / ranks / self.bandwidth_in
        outside = max(ranks - self.ranks_per_node, 0) / ranks / self.bandwidth_out
        return self.latency * min(ranks, self.peers) + volume * max(inside, outside)

    def all_gather(self, volume: float, ranks: int, stride: int = 1) -> float:
        """Seconds until all ranks have `volume` bytes, of which each had its share. stride: between their numbers."""
        near = min(ranks, max(1, self.ranks_per_node // stride))  # ranks of the group in one node
        ring = self.bandwidth_in if near == ranks else min(self.bandwidth_in, near * self.bandwidth_out)
        return self.latency * (ranks - 1).bit_length() + volume * (ranks - 1) / ranks / ring

    def all_reduce(self, volume: float, ranks: int) -> float:
        """Seconds of a sum of `volume` bytes, known to all afterwards: scattered, then gathered."""
        return 2 * self.all_gather(volume, ranks)

    def describe(self) -> str:
        """Every number with its unit, and whether it was measured or where it is from."""
        lines = []
        for entry in fields(self):
            if entry.name != "measured":
                origin = "measured" if entry.name in self.measured else f"given: {entry.metadata['source']}"
                changed = getattr(self, entry.name) != entry.default and entry.name not in self.measured
                origin = "given by the caller" if changed else origin
                lines.append(f"{entry.name:17} {getattr(self, entry.name):<8g} {entry.metadata['unit']:8} {origin}")
        return "\n".join(lines)


def units() -> dict[str, str]:
    """Unit of every number of Costs."""
    return {entry.name: entry.metadata["unit"] for entry in fields(Costs) if entry.name != "measured"}


GIVEN = Costs()


def pipelined(stages: Sequence[tuple[float, float, float]]) -> float:
    """Seconds of buckets (gather, compute, return) of which one computes while the next gathers and the last returns.

    Only the first gather and the last return find nothing to hide behind.
    """
    if not stages:
        return 0.0
    first, last = stages[0][0], stages[-1][2]
    hidden = sum(gather + back for gather, _, back in stages) - first - last
    return first + max(sum(compute for _, compute, _ in stages), hidden) + last
