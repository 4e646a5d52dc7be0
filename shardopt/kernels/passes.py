"""A step that asks, by a kernel in passes: each adds up what one round asks, and the last one writes."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from itertools import chain
from math import prod
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Ask, Asking
from shardopt.kernels.call import Call
from shardopt.kernels.extremes import Blocks, stored_by
from shardopt.kernels.key import Key
from shardopt.kernels.lines import Lines
from shardopt.kernels.rounds import asks_of, rows_at, size_of, values_of, whole_of
from shardopt.kernels.spans import PARAMETER, PIECE0, ROWS0, Places, Shape
from shardopt.kernels.twins import FACTORED, SQUARES, WHOLE, Round, of_blocks, sums_rows

MEANS = 1  # a column of a `Settle` of csrc/step.h
LANES, SETTLED = 32, 1 << 10  # results of a CTA, see csrc/passes.h
KEPT = 16  # full steps


class Rows(NamedTuple):
    """Rows of a struct of csrc/step.h; ctas: that a GPU has for all of them, each row ends with those before it."""

    rows: np.ndarray
    ctas: int


class Asked(NamedTuple):
    """What a call of a kernel that asks is told besides. scratch: doubles that the sums of pieces take."""

    places: np.ndarray
    pieces: int
    scratch: int
    answers: np.ndarray  # (parameters, asks): pointers, in the order in which they were asked
    gathers: Rows
    settles: Rows
    closes: Rows


class AskingCall(Call):
    """All parameters of a key in one bucket: filled by `add`, closed once, then `stepping` in every step.

    members: their positions in the bucket, by which they are spoken for.
    """

    def __init__(self, key: Key, function: Any) -> None:
        super().__init__(key.cpp, function)
        self.rounds = key.rounds
        self.kinds = [function.cut.kind(key, asked) for asked in key.rounds]
        self.tables = {kind: Table() for kind in self.kinds}
        self.views: list[tuple[int, ...]] = []
        self.owners: list[int] = []  # whose numbers
        self.lines: list[tuple[int, int]] = []  # pointers to the rows and columns of a factored slot
        self.matrices: list[tuple[Any, Mapping[str, Any], Any, Mapping[str, Tensor], Any]] = []  # what `Lines` is given
        self.key = key
        self.adjusted: dict[tuple[int, float], Mapping[str, Any]] = {}

    def add(self, item: Any, key: Key, shape: Shape, member: int) -> None:
        super().add(item, key, shape, member)
        for by, table in self.tables.items():
            table.add(shape.places[by], len(self.views))
        parts = {part.line: item.state[part.name].data_ptr() for part in shape.parts if part.line}
        self.lines.append((parts.get("row", 0), parts.get("column", 0)))
        self.views.append(item.layout.geo.local)
        self.owners.append(len(self.groups) - 1)
        self.device = item.p.device
        self.matrices.append((item.recipe.rule, item.group, item.layout.geo, item.state, item.codecs))

    def numbers_of(self, item: Any) -> Mapping[str, Any]:
        if WHOLE not in self.rounds:
            return item.group
        factor = item.recipe.rule.factor(item.layout.geo.view)
        return self.adjusted.setdefault((id(item.group), factor), ChainMap({"factor": factor}, item.group))

    @property
    def standing(self) -> bool:
        """Whether it asks the same in every step, but for the numbers."""
        return WHOLE not in self.rounds

    @property
    def flats(self) -> list[Tensor]:
        """What its asks are views of, whole matrices aside."""
        return [self.out, self.blocks.largest, self.blocks.least]

    def close(self) -> None:
        super().close()
        for kind, table in self.tables.items():
            table.close(max(values_of(asked) for asked, its in zip(self.rounds, self.kinds) if its == kind))
        self.answers = np.zeros((len(self.views), sum(map(len, self.rounds))), dtype=np.int64)
        self.settles = self.settling()
        self.blocks = Blocks(self.key, [geo for _, _, geo, _, _ in self.matrices], self.device)
        rows = self.blocks.rows([stored_by(self.key, *about) for _, _, *about in self.matrices])
        self.closes = counted(rows, -(-rows[:, -1] // SETTLED))
        sizes = [[sum(size_of(word, view) for word in asked) for view in self.views] for asked in self.rounds]
        self.out = torch.zeros(sum(map(sum, sizes)), dtype=torch.float64, device=self.device)
        begins = np.concatenate(([0], np.cumsum(sizes).ravel())).astype(np.int64)[:-1].reshape(-1, len(self.views))
        self.asks: list[dict[int, tuple[Ask, ...]]] = []
        self.told: list[Asked] = []
        self.squares: list[list[Tensor]] = []  # of every round, sums of rows, (..., rows)
        for asked, kind, starts in zip(self.rounds, self.kinds, begins):
            self.asks.append(
                {
                    member: tuple(asks_of(asked, view, self.out, start))
                    for member, view, start in zip(self.members, self.views, starts.tolist())
                }
            )
            if of_blocks(asked):
                self.asks[-1] = dict(zip(self.members, self.blocks.asks))
            begun = zip(starts.tolist(), self.views) if asked == SQUARES else ()
            self.squares.append([rows_at(self.out, start, view) for start, view in begun])
            table = self.tables[kind]
            gathers = self.gathering(asked, table, self.out.data_ptr() + 8 * starts)
            self.told.append(
                Asked(table.rows, table.pieces, table.scratch, self.answers, gathers, self.settles, self.closes)
            )

    def gathering(self, asked: Round, table: "Table", outs: np.ndarray) -> Rows:
        """What the sums of pieces come to, parameter by parameter: rows of a `Gather`."""
        found: list[Any] = []
        for view, (row, _), (first, sums, places), out in zip(self.views, self.lines, table.places, outs):
            if asked == WHOLE or of_blocks(asked):
                continue
            if not sums_rows(asked):
                found.append([[first * len(asked), 0, out, len(asked), places.pieces]])
                continue
            found.append(gathers_of(places.lines, sums, out))
            if "column means" in asked:
                matrices = prod(view[:-2])
                by_column = out + 8 * prod(view[:-1])
                whole = by_column + 8 * matrices * view[-1]
                old = whole + 8 * matrices
                found.append(gathers_of(places.columns, sums, by_column))
                found.append(gathers_of(places.matrices, first, whole))
                found.append([[0, row + 4 * view[-2] * i, old + 8 * i, 1, view[-2]] for i in range(matrices)])
        rows = np.concatenate([np.array(some, dtype=np.int64).reshape(-1, 5) for some in [[], *found]])
        counts = rows[:, 3]
        return counted(rows, np.where(counts < LANES, counts, -(-counts // LANES)))

    def settling(self) -> Rows:
        """Rows of a `Settle`, two a parameter; the pointers of the means are `stepping`'s."""
        rows = [
            (pointer, 0, step, group, size_of(word, view))
            for view, lines, step, group in zip(self.views, self.lines, self.steps, self.owners)
            for word, pointer in zip(FACTORED, lines if FACTORED in self.rounds else ())
        ]
        found = np.array(rows, dtype=np.int64).reshape(-1, 5)
        return counted(found, -(-found[:, -1] // SETTLED))

    def stepping(
        self, addresses: np.ndarray, totals: Mapping[str, Any], gradients: Sequence[Tensor], taken: Tensor | None = None
    ) -> Asking:
        """The step of all members, for `shardopt.engine.drive`: yields {position: what it asks}, is sent {position: the
        answers}, or None where these lie where `answered` was told. addresses: of the gradients of the whole bucket,
        which are kept alive as long as they are read."""
        if not self.rounds:  # Adafactor may ask nothing
            return self.run(addresses, totals, taken)
        numbers = self.function.prepared(self.numbers(addresses, totals))
        alive: list[Tensor] = []  # what the answers' pointers point to
        lines = [Lines(*about) for about in self.matrices if SQUARES in self.rounds]
        for which in range(len(self.rounds)):
            replies = yield self.asked(which, numbers, taken, lines)
            if replies is not None:
                answers = [[reply.contiguous() for reply in replies[member]] for member in self.members]
                if self.rounds[which] == SQUARES:
                    answers = [[line.told(reply)] for line, reply in zip(lines, answers)]
                self.answered(which, [[answer.data_ptr() for answer in row] for row in answers])
                alive.extend(chain.from_iterable(answers))
        self.function.write(self.spans, self.tiles, numbers, self.counters, taken, self.told[-1])
        for line in lines:
            line.write(taken)

    def answered(self, which: int, pointers: Sequence[Sequence[int]]) -> None:
        """Where the answers of a round lie, those of every member."""
        columns = self.columns(which)
        self.answers[:, columns] = pointers
        if self.rounds[which] == FACTORED:
            self.settles.rows[:, MEANS] = self.answers[:, columns][:, :2].ravel()
        if of_blocks(self.rounds[which]):
            self.blocks.tell(self.closes.rows, pointers)

    def columns(self, which: int) -> slice:
        """Of `answers`, those of a round."""
        first = sum(map(len, self.rounds[:which]))
        return slice(first, first + len(self.rounds[which]))

    def asked(self, which: int, numbers: Any, taken: Tensor | None, lines: Sequence[Lines]) -> Mapping[int, Any]:
        """What is asked of every member in a round, worked out; nobody here keeps it."""
        asks: Mapping[int, Any] = self.asks[which]
        if self.rounds[which] == WHOLE:
            xs = [torch.empty(view, device=self.device) for view in self.views]
            self.answered(which, [[x.data_ptr()] for x in xs])  # until then it lies where the answer will
            asks = {member: (whole_of(x, *about[:3]),) for member, x, about in zip(self.members, xs, self.matrices)}
        here, lying = self.columns(which), None
        if of_blocks(self.rounds[which]):
            lying = self.answers[:, here].copy()
            self.answers[:, here] = self.blocks.begin()  # the pass raises what lies there
        self.function.sums(which, self.spans, numbers, self.told[which], taken)
        if lying is not None:
            self.answers[:, here] = lying
        if self.rounds[which] == SQUARES:
            asks = {member: line.asked(x) for member, line, x in zip(self.members, lines, self.squares[which])}
        return asks


class Table:
    """The places of a call's spans for one kind of pieces. scratch: doubles that their sums take: first those of whole
    pieces, then those of rows and columns. places: of every parameter, with its first piece and its first such sum."""

    def __init__(self) -> None:
        self.added: list[np.ndarray] = []
        self.places: list[tuple[int, int, Places]] = []
        self.pieces = self.sums = 0

    def add(self, places: Places, parameter: int) -> None:
        rows = places.rows.copy()
        rows[:, PARAMETER] = parameter
        rows[:, PIECE0] += self.pieces
        rows[:, ROWS0 : ROWS0 + 2] += self.sums
        self.added.append(rows)
        self.places.append((self.pieces, self.sums, places))
        self.pieces, self.sums = self.pieces + places.pieces, self.sums + places.sums

    def close(self, most: int) -> None:
        """No parameter is added any more. most: sums of a whole piece."""
        self.rows = np.concatenate(self.added)
        before = self.pieces * most
        self.rows[:, ROWS0 : ROWS0 + 2] += before
        self.places = [(first, sums + before, places) for first, sums, places in self.places]
        self.scratch = before + self.sums


def gathers_of(places: np.ndarray, first: int, out: int) -> np.ndarray:
    """Gathers of a parameter whose sums begin at `first` and whose results begin at the address `out`."""
    begin, which, count, terms = places.T
    return np.stack([first + begin, 0 * begin, out + 8 * which, count, terms], axis=1)


def counted(rows: np.ndarray, ctas: np.ndarray) -> Rows:
    return Rows(np.column_stack([rows, np.cumsum(ctas) - ctas]), int(ctas.sum()))


class Buckets:
    """The calls of every bucket, kept as long as nothing but gradients and numbers changes, and given up when no bucket
    of the last `KEPT` full steps was that one: sets of parameters may take turns in having gradients."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[list[Any], list[AskingCall], list[int]]] = {}
        self.used: dict[Any, int] = {}  # in which full step last
        self.steps = 0

    def begin(self) -> None:
        """A full step begins."""
        self.steps += 1
        for place in [place for place, last in self.used.items() if self.steps - last > KEPT]:
            del self.known[place], self.used[place]

    def calls(self, items: Sequence[Any], found: Sequence[Any]) -> tuple[list[AskingCall], list[int]]:
        """One call a kernel, and the positions of the items that have none. found: the `Found` of every item, or why it
        has none."""
        facts = [
            (id(runs_with), id(item.group), item.p.data_ptr(), *(part.data_ptr() for part in item.state.values()))
            for item, runs_with in zip(items, found)
        ]
        place = id(items[0].layout), len(items)
        if place not in self.known or self.known[place][0] != facts:
            self.known[place] = facts, *made(items, found)
        self.used[place] = self.steps
        _, calls, left = self.known[place]
        return calls, left


def made(items: Sequence[Any], found: Sequence[Any]) -> tuple[list[AskingCall], list[int]]:
    calls: dict[Any, AskingCall] = {}
    left = []
    for position, (item, runs_with) in enumerate(zip(items, found)):
        if isinstance(runs_with, str):
            left.append(position)
            continue
        key, step, shape = runs_with
        place = key.cpp, item.p.device
        if place not in calls:
            calls[place] = AskingCall(key, step)
        calls[place].add(item, key, shape, position)
    for call in calls.values():
        call.close()
    return list(calls.values()), left
