"""What every way to orthogonalize costs on a mesh: bytes, FLOPs, buffers and predicted seconds of a step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from shardopt.dtensor.cost import GIVEN, Costs, pipelined
from shardopt.dtensor.member import Member
from shardopt.dtensor.plan import Plan, plan, sized

WAYS = ("all-gather", "full", "gram", "auto", "periodic", "local")


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """replicas x shards, as HSDP has them; replicas are 1 for FSDP."""

    shards: int
    replicas: int = 1

    @property
    def ranks(self) -> int:
        return self.shards * self.replicas

    def __str__(self) -> str:
        return f"{self.replicas}x{self.shards}" if self.replicas > 1 else f"{self.shards}"


def mesh_of(text: str) -> Mesh:
    """From `8`, or `2x8`: replicate x shard."""
    sizes = text.lower().split("x")
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) for size in sizes):
        raise ValueError(f"--mesh {text}: give the shards, as 8, or replicas x shards, as 2x8")
    return Mesh(shards=int(sizes[-1]), replicas=int(sizes[0]) if len(sizes) == 2 else 1)


@dataclass(frozen=True, kw_only=True)
class Options:
    """What the plans share. period: of "periodic", which is whole in one step of `period`, local in the others."""

    share: bool | None = None
    bucket_bytes: int | None = None
    period: int = 5
    costs: Costs = GIVEN


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One way. sent, flops: bytes and FLOPs a rank and step, means. balance: the busiest rank's FLOPs over the mean."""

    way: str
    sent: float
    flops: float
    balance: float
    buffers: float
    seconds: float
    shared: bool = False


def plan_for(way: str, members: Sequence[Member], mesh: Mesh, options: Options) -> Plan:
    """ "gram" where the cut allows it, else whole."""
    modes = [way if way != "gram" or member.long_side_cut else "full" for member in members]
    share, size = options.share, options.bucket_bytes
    return plan(members, mesh.shards, mesh.replicas, modes=modes, share=share, bucket_bytes=size, costs=options.costs)


def forecast(way: str, members: Sequence[Member], mesh: Mesh, options: Options) -> Forecast:
    """One of WAYS."""
    if way == "all-gather":
        return gathered(members, mesh, options)
    if way == "periodic":
        return periodic(members, mesh, options)
    made = plan_for(way, members, mesh, options)
    total = made.total
    return Forecast(
        way=way,
        sent=total.sent,
        flops=total.mean,
        balance=total.balance,
        buffers=made.buffers,
        seconds=made.seconds(options.costs),
        shared=made.shared,
    )


def gathered(members: Sequence[Member], mesh: Mesh, options: Options) -> Forecast:
    """Every rank gets and orthogonalizes every matrix that no rank holds."""
    cut = [member for member in members if member.holders is None]
    held = [member.flops * max(map(member.holders.count, member.holders)) for member in members if member.holders]
    volume = sum(member.bytes_there * member.count for member in cut)
    flops = sum(member.flops * member.count for member in cut) + sum(held)
    elements = sum(member.elements * member.count for member in cut)
    buckets = max(1, math.ceil(volume / (options.bucket_bytes or sized(volume))))
    costs = options.costs
    stage = (
        costs.all_gather(volume / buckets, mesh.shards),
        costs.compute(flops / buckets, elements / buckets),
        0.0,
    )
    return Forecast(
        way="all-gather",
        sent=volume * (mesh.shards - 1) / mesh.shards,
        flops=flops,
        balance=1.0,
        buffers=3 * volume / buckets if mesh.shards > 1 else 0,
        seconds=pipelined([stage] * buckets),
    )


def periodic(members: Sequence[Member], mesh: Mesh, options: Options) -> Forecast:
    """Means over a period (MuonBP, arXiv 2510.16981); buffers are those of its one full step."""
    full, local = (forecast(way, members, mesh, options) for way in ("full", "local"))

    def mean(name: str) -> float:
        return (getattr(full, name) + (options.period - 1) * getattr(local, name)) / options.period

    return Forecast(
        way="periodic",
        sent=mean("sent"),
        flops=mean("flops"),
        balance=mean("balance"),
        buffers=full.buffers,
        seconds=mean("seconds"),
        shared=full.shared,
    )
