"""Adds up what the members of a bucket cost the ranks: FLOPs, bytes on the wire, bytes of buffers, seconds."""

import math
from collections.abc import Sequence

from shardopt.dtensor.cost import GRAM_BYTES, Costs, gram_flops, orthogonalize_flops
from shardopt.dtensor.member import Member


class Amounts:
    """Whole amounts by place, and the largest of them."""

    def __init__(self) -> None:
        self.by: dict[int, int] = {}
        self.most = 0

    def add(self, place: int, amount: int) -> None:
        self.by[place] = self.by.get(place, 0) + amount
        self.most = max(self.most, self.by[place])

    @property
    def total(self) -> int:
        return sum(self.by.values())


class Tally:
    """Of one bucket, or of all. Positions are replica * shards + shard; where replicas repeat each other, shard.

    flops: of the matrices that a position owns. there, back: bytes of those that travel to it and from it;
    pieces_there, pieces_back: the same by replica. kept: bytes, both ways, that a shard has of matrices that stay.
    even, even_elements: FLOPs and elements that every rank works on besides; even_kept: its bytes of them. repeated:
    bytes of results that replicas tell each other; summed: bytes of Gram matrices.
    """

    def __init__(self, shards: int, replicas: int, shared: bool) -> None:
        self.shards, self.replicas, self.shared = shards, replicas, shared
        self.flops, self.there, self.back, self.kept = Amounts(), Amounts(), Amounts(), Amounts()
        self.pieces_there, self.pieces_back = Amounts(), Amounts()
        self.batches: dict[int, dict[tuple[int, int, float], int]] = {}  # position -> (rows, cols, FLOPs) -> matrices
        self.elements = self.matrices = self.repeated = self.summed = 0
        self.even = self.even_elements = self.even_kept = 0

    @property
    def positions(self) -> int:
        return self.shards * (self.replicas if self.shared else 1)

    def add(self, member: Member, mode: str, owners: Sequence[int]) -> None:
        """Add one member. owners: of its matrices; none where every rank works on its own piece."""
        self.elements += member.elements * member.count
        self.matrices += member.count
        if mode != "full":
            self.add_pieces(member, mode)
        for position in owners:
            replica, shard = divmod(position, self.shards)
            self.flops.add(position, int(member.flops))
            batches = self.batches.setdefault(position, {})
            shape = member.rows, member.cols, member.flops
            batches[shape] = batches.get(shape, 0) + 1
            if member.holders is not None or self.shards == 1:
                self.kept.add(shard, member.bytes_there + member.bytes_back)
            else:
                self.there.add(position, member.bytes_there)
                self.back.add(position, member.bytes_back)
                self.pieces_there.add(replica, member.bytes_there)
                self.pieces_back.add(replica, member.bytes_back)
            if self.shared:
                self.repeated += member.bytes_back

    def add_pieces(self, member: Member, mode: str) -> None:
        held = member.count / self.shards
        self.even_elements += math.ceil(member.elements * held)
        self.even_kept += math.ceil((member.bytes_there + member.bytes_back) * held)
        if mode == "gram":
            ratio = member.flops / max(1.0, orthogonalize_flops(member.rows, member.cols))
            self.even += member.count * int(ratio * gram_flops(member.rows, member.cols, self.shards))
            self.summed += member.count * min(member.rows, member.cols) ** 2 * GRAM_BYTES
        else:
            self.even += int(local_flops(member, self.shards))

    @property
    def mean(self) -> float:
        """FLOPs a rank."""
        return self.flops.total / self.positions + self.even

    @property
    def balance(self) -> float:
        """FLOPs of the busiest rank over the mean."""
        return (self.flops.most + self.even) / self.mean if self.mean else 1.0

    @property
    def sent(self) -> float:
        """Bytes a rank sends in a step, mean over the ranks."""
        copies = self.replicas if self.shared else 1
        exchanged = (self.pieces_there.total + self.pieces_back.total) * (self.shards - 1) / self.shards**2 / copies
        told = self.repeated * (copies - 1) / copies / self.shards
        return exchanged + told + 2 * self.summed * (self.shards - 1) / self.shards

    @property
    def buffers(self) -> int:
        """Bytes, encoded, that the fullest rank has of everything: whole matrices, its pieces, replicas' results."""
        pieces = self.pieces_there.most + self.pieces_back.most + self.repeated
        whole = self.there.most + self.back.most
        return whole + -(-pieces // self.shards) + self.kept.most + self.even_kept + self.summed

    def stages(self, costs: Costs) -> tuple[float, float, float]:
        """Seconds of gather, compute and return, each of the rank for which it lasts longest."""
        there, back = self.there.most, self.back.most
        gather = costs.all_to_all(there, self.shards) if there else 0.0
        gather += costs.all_reduce(self.summed, self.shards) if self.summed else 0.0
        returned = costs.all_to_all(back, self.shards) if back else 0.0
        if self.repeated:
            returned += costs.all_gather(self.repeated / self.shards, self.replicas, stride=self.shards)
        return gather, self.compute(costs), returned

    def compute(self, costs: Costs) -> float:
        """Seconds of the busiest rank; matrices of one shape are one batch."""
        owned = (
            sum(costs.compute(flops * count, rows * cols * count) for (rows, cols, flops), count in batches.items())
            for batches in self.batches.values()
        )
        return max(owned, default=0.0) + (costs.compute(self.even, self.even_elements) if self.even else 0.0)


def local_flops(member: Member, shards: int) -> float:
    """FLOPs a rank when each orthogonalizes what it holds of a stack: another algorithm, unless that is matrices."""
    if member.holders is not None:
        return member.flops * max(map(member.holders.count, member.holders), default=0)
    rows, cols = member.rows, member.cols
    pieces = (-(-rows // shards), cols) if member.cut == -2 else (rows, -(-cols // shards))
    whole = max(1.0, orthogonalize_flops(rows, cols))
    return member.count * member.flops / whole * orthogonalize_flops(*pieces)
