"""A round that is asked in every step alike: answered for all parameters at once, not for one after another."""

import itertools
from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Ask, Max, Mean, Sum
from shardopt.dtensor.layout import Layout
from shardopt.dtensor.messages import dims_over, messages_of, ordered, unordered


class Held:
    """What asks of one kind hold, end to end, in the order in which they are asked.

    xs: views of `flats`, 1-d tensors of one dtype and device.
    """

    def __init__(self, xs: Sequence[Tensor], flats: Sequence[Tensor]) -> None:
        self.flats = list(flats)
        self.sizes = [x.numel() for x in xs]
        self.begins = (np.cumsum(self.sizes) - self.sizes).astype(np.int64).tolist()
        self.device = flats[0].device
        some = [flat for flat in flats if flat.numel()]
        bases = np.cumsum([0, *(flat.numel() for flat in some)]).tolist()
        base_of = {flat.untyped_storage().data_ptr(): base for flat, base in zip(some, bases)}
        places = [base_of[x.untyped_storage().data_ptr()] + x.storage_offset() if x.numel() else 0 for x in xs]
        self.taken = indices(places, self.sizes).to(self.device)

    @property
    def count(self) -> int:
        return len(self.taken)

    def take(self) -> Tensor:
        """What the flat tensors hold now."""
        return torch.cat(self.flats).index_select(0, self.taken)

    def of(self, members: Sequence[int]) -> Tensor:
        """Where these asks are in it."""
        return indices([self.begins[i] for i in members], [self.sizes[i] for i in members]).to(self.device)

    def pointers(self, answers: Tensor) -> list[int]:
        """Where the answer to each begins, if they lie like this."""
        return [answers.data_ptr() + answers.element_size() * begin for begin in self.begins]


class Standing:
    """`Round` for what never changes but in its numbers; the same messages and the same bits.

    asked: `Sum` and `Mean` with `dim=()`, whose x are views of the `flats` that are float64, and `Max`, of the float32
    ones; flats are 1-d tensors of one device. pointers: where every answer lies once the round is finished, float64
    where it is a 0-d sum, else float32.
    """

    def __init__(self, counter: Any, asked: Sequence[tuple[Layout, Ask]], flats: Sequence[Tensor]) -> None:
        assert all(isinstance(ask, Max) or (isinstance(ask, Sum | Mean) and ask.dim == ()) for _, ask in asked)
        self.counter = counter
        self.pending: Any = None
        highest = [isinstance(ask, Max) for _, ask in asked]
        among = {kind: itertools.count() for kind in (False, True)}
        place = [next(among[its]) for its in highest]  # of each ask, among those of its kind
        self.kinds = sorted(set(highest))  # that anybody asks, whatever is local
        self.held = {
            kind: Held(
                [ask.x for (_, ask), its in zip(asked, highest) if its == kind],
                [flat for flat in flats if (flat.dtype == torch.float32) == kind],
            )
            for kind in (False, True)
        }
        self.messages = [
            (mesh, axis, op, highest[members[0]], self.held[highest[members[0]]].of([place[i] for i in members]))
            for mesh, axis, op, members in messages_of(asked)
        ]
        sums, maxima = self.held[False], self.held[True]
        counts = [float(count(*one)) for one, its in zip(asked, highest) if not its]
        self.counts = torch.tensor(np.repeat(counts, sums.sizes), dtype=torch.float64, device=sums.device)
        self.answers = torch.empty(sums.count, dtype=torch.float64, device=sums.device)
        self.lines = torch.empty(sums.count, dtype=torch.float32, device=sums.device)
        self.maxima = torch.empty(maxima.count, dtype=torch.float32, device=sums.device)
        scalars, lines, largest = sums.pointers(self.answers), sums.pointers(self.lines), maxima.pointers(self.maxima)
        self.pointers = [
            largest[i] if its else scalars[i] if ask.x.ndim == 0 else lines[i]
            for (_, ask), its, i in zip(asked, highest, place)
        ]

    def start(self) -> None:
        """Begin to answer what the flat tensors hold now."""
        self.values = {kind: self.held[kind].take() for kind in self.kinds}
        if True in self.values:
            self.values[True] = ordered(self.values[True])
        self.sent = 0
        self.counter.rounds += bool(self.messages)
        self.issue()

    def issue(self) -> None:
        """Send the next message, if there is one."""
        if self.sent < len(self.messages):
            mesh, axis, op, kind, members = self.messages[self.sent]
            flat = self.values[kind].index_select(0, members).to(mesh.device_type)
            self.pending = self.counter.send(mesh, axis, op, flat), flat, self.values[kind], members
            self.sent += 1

    def finish(self) -> None:
        """Wait for what is under way and put the answers into their places."""
        for _ in self.messages:
            work, flat, values, members = self.pending
            work.wait()
            values.index_copy_(0, members, flat.to(values.device))
            self.pending = None
            self.issue()
        if False in self.values:
            torch.div(self.values[False], self.counts, out=self.answers)
            self.lines.copy_(self.answers)
        if True in self.values:
            self.maxima.copy_(unordered(self.values[True]))
        del self.values


def indices(begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The numbers begin, begin + 1, ... of every stretch, one after another; int64."""
    counts = np.array(sizes, dtype=np.int64)
    ends = np.cumsum(counts)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - counts, counts)
    return torch.from_numpy(np.repeat(np.array(begins, dtype=np.int64), counts) + within)


def count(layout: Layout, ask: Any) -> int:
    """By what the sum is divided."""
    return max(1, prod(layout.geo.view[dim] for dim in dims_over(layout, ask))) if isinstance(ask, Mean) else 1
