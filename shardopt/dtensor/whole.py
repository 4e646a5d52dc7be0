"""Answers `Whole`: matrices travel to their owners, are worked on there, and the results travel back.

A round is one message to the owners and one back, whatever the number of matrices; where replicas share the work, a
third tells each of them the others' results. Everything is encoded by the blocks of the GLOBAL parameter and decoded
again, also what stays on its rank: the bits of the answer do not depend on the mesh.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardopt.dtensor.exchange import Exchange, Shape
from shardopt.dtensor.held import length, place, select
from shardopt.dtensor.route import Parcel, Route
from shardopt.dtensor.wire import Piece


class Passage:
    """The matrices of one round on their way there and back.

    xs: of every task of the route, fp32 in the local view. counter: the `Answers`, which also answer what must be
    known before anything travels. results: like xs, once `advance` has come to its end.
    """

    def __init__(self, route: Route, xs: Sequence[Tensor], counter: Any) -> None:
        mesh = route.tasks[0].layout.mesh
        self.route, self.tasks, self.counter = route, route.tasks, counter
        self.coder = counter.coder
        self.places = [(x.shape, x.device) for x in xs]
        # the group speaks on the mesh's device, also for parameters that are offloaded from it
        self.results = [x if mesh is None or x.device.type == mesh.device_type else x.to(mesh.device_type) for x in xs]
        self.device = self.results[0].device
        self.course = self.travel()
        self.advance()

    def advance(self) -> bool:
        """Wait for the message under way and do what waited for it; whether another is under way now."""
        return next(self.course, self) is None

    def travel(self) -> Iterator[None]:
        """Yields whenever a message is under way."""
        near = self.route.held[self.route.replicas.position]
        encoded: list[Piece] = []
        yield from self.encode(encoded)
        gather = self.there(near, encoded)
        del encoded
        yield
        stacks = self.stacks(gather.wait())
        self.counter.worked += worked([self.tasks[i].work for i in stacks], stacks)
        back = self.back(near, stacks)
        gather.release(back.own)
        del gather, stacks
        yield
        pieces = self.dealt(near, [iter(tensors) for tensors in back.wait()])
        arrived = [back]
        if self.route.shared:
            arrived.append(self.tell(pieces))
            yield
            pieces = []
            for parcels, tensors in zip(self.route.held, arrived[-1].wait()):
                pieces += self.dealt(parcels, [iter(tensors)] * self.route.team.size)
        self.results = self.decoded(pieces)
        for message in arrived:
            message.release(self.results)

    def encode(self, encoded: list[Piece]) -> Iterator[None]:
        """Fill `encoded` with the parts of every x; maxima of blocks that lie on several ranks are asked first."""
        asking = {
            i: task.there.encoding(x, task.layout.geo, self.coder)
            for i, (task, x) in enumerate(zip(self.tasks, self.results))
        }
        found: dict[int, Piece] = {}
        replies: dict[int, Any] = dict.fromkeys(asking)
        while replies:
            asked: dict[int, Any] = {}
            for i, reply in replies.items():
                try:
                    asked[i] = asking[i].send(reply)
                except StopIteration as stop:
                    found[i] = stop.value
            if asked:
                maxima = self.counter.start([(self.tasks[i].layout, ask) for i, ask in asked.items()])
                yield
            replies = dict(zip(asked, maxima.finish())) if asked else {}
        encoded.extend(found[i] for i in range(len(self.tasks)))
        self.results = []

    def there(self, near: list[Parcel], encoded: list[Piece]) -> Exchange:
        """Send what this rank holds to the owners."""
        outgoing, expected = self.lists(), self.lists()
        for p in near:
            outgoing[p.peer] += [select(x, p.matrices) for x in encoded[p.task]]
        for p in self.route.gathered:
            task, held = self.tasks[p.task], self.tasks[p.task].held[p.peer]
            expected[p.peer] += task.there.shapes(length(p.matrices), held.rows, held.cols)
        return Exchange(self.route.team, outgoing, expected, self.device, self.counter, self.route.silent)

    def stacks(self, arrived: list[list[Tensor]]) -> dict[int, Tensor]:
        """Task -> the matrices that this rank works on, fp32 (count, rows, cols)."""
        pieces: dict[int, list[Any]] = {i: [] for i in self.route.owned}
        coming = [iter(tensors) for tensors in arrived]
        for p in self.route.gathered:
            task, held = self.tasks[p.task], self.tasks[p.task].held[p.peer]
            piece = [next(coming[p.peer]) for _ in task.there.parts]
            pieces[p.task].append((piece, p.matrices, held.rows, held.cols))
        found = {}
        for i, count in self.route.owned.items():
            there = self.tasks[i].there
            rows, cols = ((0, there.rows),), ((0, there.cols),)
            found[i] = there.decode(there.join(count, pieces.pop(i)), rows, cols, self.coder)
        return found

    def back(self, near: list[Parcel], stacks: dict[int, Tensor]) -> Exchange:
        """Send to everyone what it holds of the results; empties `stacks`."""
        outgoing, expected = self.lists(), self.lists()
        encoded = {i: self.tasks[i].back.encode(stacks.pop(i), self.coder) for i in list(stacks)}
        for p in self.route.gathered:
            task, held = self.tasks[p.task], self.tasks[p.task].held[p.peer]
            outgoing[p.peer] += task.back.cut(encoded[p.task], p.matrices, held.rows, held.cols)
        for p in near:
            expected[p.peer] += self.shapes_back(p)
        return Exchange(self.route.team, outgoing, expected, self.device, self.counter, self.route.silent)

    def tell(self, pieces: list[tuple[Parcel, Piece]]) -> Exchange:
        """Send this replica's results, as they came, to those who hold the same shard in the others."""
        mine = [x for _, piece in pieces for x in piece]
        expected = [[shape for p in parcels for shape in self.shapes_back(p)] for parcels in self.route.held]
        team = self.route.replicas
        return Exchange(team, [mine] * team.size, expected, self.device, self.counter, not any(expected))

    def dealt(self, parcels: list[Parcel], coming: Sequence[Iterator[Tensor]]) -> list[tuple[Parcel, Piece]]:
        """Every parcel with its parts, the next of what came from its peer."""
        return [(p, [next(coming[p.peer]) for _ in self.tasks[p.task].back.parts]) for p in parcels]

    def decoded(self, pieces: list[tuple[Parcel, Piece]]) -> list[Tensor]:
        """The local results."""
        found: dict[int, Tensor] = {}
        for p, piece in pieces:
            task, held = self.tasks[p.task], self.tasks[p.task].held[self.route.team.position]
            x = task.back.decode(piece, held.rows, held.cols, self.coder)
            if len(x) == len(held.matrices):
                found[p.task] = x
                continue
            if p.task not in found:
                found[p.task] = x.new_empty((len(held.matrices), *x.shape[1:]))
            place(found[p.task], x, p.matrices)
        return [
            found[i].view(shape).to(device) if i in found else torch.zeros(shape, device=device)
            for i, (shape, device) in enumerate(self.places)
        ]

    def shapes_back(self, p: Parcel) -> list[Shape]:
        task, held = self.tasks[p.task], self.tasks[p.task].held[self.route.team.position]
        return task.back.shapes(length(p.matrices), held.rows, held.cols)

    def lists(self) -> list[list[Any]]:
        """One empty list a position."""
        return [[] for _ in range(self.route.team.size)]


def worked(works: Sequence[Any], stacks: dict[int, Tensor]) -> int:
    """Replace every stack by what its work makes of it; how many matrices that were.

    An accelerator gets all of one shape and work as one batch; on a CPU matrices stay in the cache one by one.
    """
    batches: dict[Any, list[int]] = {}
    for work, (i, x) in zip(works, stacks.items()):
        kind = (i,) if x.device.type == "cpu" else x.shape[1:]
        batches.setdefault((work, x.device, *kind), []).append(i)
    for (work, *_), members in batches.items():
        x = joined([stacks[i] for i in members])
        y = joined([work(piece) for piece in x.split(1 if x.device.type == "cpu" else len(x))])
        stacks.update(zip(members, y.split([len(stacks[i]) for i in members])))
    return sum(len(x) for x in stacks.values())


def joined(pieces: Sequence[Tensor]) -> Tensor:
    return pieces[0] if len(pieces) == 1 else torch.cat(list(pieces))
