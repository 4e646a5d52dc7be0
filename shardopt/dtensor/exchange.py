"""Tensors from every rank of a team to every other, in one message whose splits may be of any size.

What a rank sends itself is handed over as it is, and nothing is padded to a common size. `all_to_all_single` is the
one primitive that takes uneven splits on every backend.
"""

from collections.abc import Iterable, Sequence
from math import prod
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardopt.dtensor.reserve import Reserve
from shardopt.dtensor.team import Team

Shape = tuple[tuple[int, ...], torch.dtype]
ALIGNED = 4  # bytes: a segment begins where its widest elements may


class Exchange:
    """One exchange on the way. outgoing: by position, the tensors for that rank; expected: by position, the shapes of
    what comes from there, in the order in which the sender lists them. silent: no rank of the team sends another
    anything, by global facts; then there is no message. counter: gets `collectives`, `bytes`, `sent`, and has the
    `reserve` that buffers come from.
    """

    def __init__(
        self,
        team: Team,
        outgoing: Sequence[Sequence[Tensor]],
        expected: Sequence[Sequence[Shape]],
        device: torch.device,
        counter: Any,
        silent: bool = False,
    ) -> None:
        self.team, self.own = team, list(outgoing[team.position])
        self.reserve: Reserve = counter.reserve
        self.work: Any = None
        self.arriving: Tensor | None = None
        if silent or team.size == 1:
            return
        leaving = [[] if position == team.position else outgoing[position] for position in range(team.size)]
        self.expected = [[] if position == team.position else expected[position] for position in range(team.size)]
        sent = [segment(shapes(leaving[position]))[1] for position in team.order]
        self.sizes = [segment(self.expected[position])[1] for position in team.order]
        # what is sent lives until the message has arrived
        self.leaving = self.reserve.take(sum(sent), device)
        self.arriving = self.reserve.take(sum(self.sizes), device)
        pack([leaving[position] for position in team.order], self.leaving[: sum(sent)])
        ends = self.arriving[: sum(self.sizes)], self.leaving[: sum(sent)]
        self.work = dist.all_to_all_single(*ends, self.sizes, sent, group=team.group, async_op=True)
        counter.collectives += 1
        counter.bytes += sum(sent)
        counter.sent += sum(sent)

    def wait(self) -> list[list[Tensor]]:
        """By position, the tensors that came from there: views of one buffer, until `release`."""
        found: list[list[Tensor]] = [[] for _ in range(self.team.size)]
        if self.work is not None:
            self.work.wait()
            self.work = None
            self.reserve.give(self.leaving)
            del self.leaving
            assert self.arriving is not None
            for position, piece in zip(self.team.order, self.arriving[: sum(self.sizes)].split(self.sizes)):
                found[position] = unpacked(piece, self.expected[position])
        found[self.team.position] = self.own
        return found

    def release(self, readers: Iterable[Tensor]) -> None:
        """What came has been read, but for what `readers` may still be views of."""
        if self.arriving is not None:
            self.reserve.give(self.arriving, readers)
            self.arriving = None


def shapes(tensors: Sequence[Tensor]) -> list[Shape]:
    return [(tuple(x.shape), x.dtype) for x in tensors]


def segment(shapes: Sequence[Shape]) -> tuple[list[tuple[int, int]], int]:
    """(place, bytes) of every tensor of a segment, the widest dtypes first, and the length of it all."""
    places = [(0, 0)] * len(shapes)
    end = 0
    for i in sorted(range(len(shapes)), key=lambda i: -shapes[i][1].itemsize):
        size = prod(shapes[i][0]) * shapes[i][1].itemsize
        places[i] = (end, size)
        end += size
    return places, -(-end // ALIGNED) * ALIGNED


def pack(segments: Sequence[Sequence[Tensor]], into: Tensor) -> None:
    """Write the bytes of all tensors of all segments into uint8 (bytes,)."""
    pieces = []
    for tensors in segments:
        size = 0
        for x in sorted(tensors, key=lambda x: -x.dtype.itemsize):
            pieces.append(x.contiguous().view(-1).view(torch.uint8))
            size += pieces[-1].numel()
        if size % ALIGNED:
            pieces.append(torch.zeros(-size % ALIGNED, dtype=torch.uint8, device=into.device))
    if pieces:
        torch.cat(pieces, out=into)


def unpacked(piece: Tensor, shapes: Sequence[Shape]) -> list[Tensor]:
    places, _ = segment(shapes)
    return [piece.narrow(0, a, n).view(dtype).view(shape) for (a, n), (shape, dtype) in zip(places, shapes)]
