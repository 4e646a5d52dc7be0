"""A round of sums that is asked in every step alike: answered for all parameters at once, not for one after another."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Ask, Mean, Sum
from shardopt.dtensor.layout import Layout
from shardopt.dtensor.messages import dims_over, messages_of


class Standing:
    """`Round` for what never changes but in its numbers; the same messages and the same bits.

    asked: `Sum` and `Mean` with `dim=()`, whose x are views of `flats`, 1-d float64 tensors of one device.
    pointers: where every answer lies once the round is finished, float64 where it is 0-d, else float32.
    """

    def __init__(self, counter: Any, asked: Sequence[tuple[Layout, Ask]], flats: Sequence[Tensor]) -> None:
        assert all(isinstance(ask, Sum | Mean) and ask.dim == () for _, ask in asked)
        self.counter, self.flats = counter, flats
        self.pending: Any = None
        sizes = [ask.x.numel() for _, ask in asked]
        begins = (np.cumsum(sizes) - sizes).tolist()
        bases = np.cumsum([0, *(flat.numel() for flat in flats)]).tolist()
        base_of = {flat.untyped_storage().data_ptr(): base for flat, base in zip(flats, bases)}
        places = [base_of[ask.x.untyped_storage().data_ptr()] + ask.x.storage_offset() for _, ask in asked]
        device = flats[0].device
        self.asked = indices(places, sizes).to(device)
        self.messages = [
            (mesh, axis, op, indices([begins[i] for i in members], [sizes[i] for i in members]).to(device))
            for mesh, axis, op, members in messages_of(asked)
        ]
        self.counts = torch.tensor(np.repeat([float(count(*one)) for one in asked], sizes), device=device)
        self.answers = torch.empty(sum(sizes), dtype=torch.float64, device=device)
        self.lines = torch.empty(sum(sizes), dtype=torch.float32, device=device)
        self.pointers = [
            self.answers.data_ptr() + 8 * begin if ask.x.ndim == 0 else self.lines.data_ptr() + 4 * begin
            for (_, ask), begin in zip(asked, begins)
        ]

    def start(self) -> None:
        """Begin to answer what the flat tensors hold now."""
        self.values = torch.cat(list(self.flats)).index_select(0, self.asked)
        self.sent = 0
        self.counter.rounds += bool(self.messages)
        self.issue()

    def issue(self) -> None:
        """Send the next message, if there is one."""
        if self.sent < len(self.messages):
            mesh, axis, op, members = self.messages[self.sent]
            flat = self.values.index_select(0, members).to(mesh.device_type)
            self.pending = self.counter.send(mesh, axis, op, flat), flat, members
            self.sent += 1

    def finish(self) -> None:
        """Wait for what is under way and put the answers into their places."""
        for _ in self.messages:
            work, flat, members = self.pending
            work.wait()
            self.values.index_copy_(0, members, flat.to(self.values.device))
            self.pending = None
            self.issue()
        torch.div(self.values, self.counts, out=self.answers)
        self.lines.copy_(self.answers)
        del self.values


def indices(begins: Sequence[int], sizes: Sequence[int]) -> Tensor:
    """The numbers begin, begin + 1, ... of every stretch, one after another; int64."""
    ends = np.cumsum(sizes)
    within = np.arange(ends[-1] if len(ends) else 0) - np.repeat(ends - sizes, sizes)
    return torch.from_numpy(np.repeat(np.array(begins, dtype=np.int64), sizes) + within)


def count(layout: Layout, ask: Any) -> int:
    """By what the sum is divided."""
    return max(1, prod(layout.geo.view[dim] for dim in dims_over(layout, ask))) if isinstance(ask, Mean) else 1
