"""A step that asks, by a kernel in passes: each adds up what one round asks, and the last one writes."""

from collections import ChainMap
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardopt.asks import Ask, Asking, Mean, Sum, Whole
from shardopt.kernels.call import Call
from shardopt.kernels.key import Key
from shardopt.kernels.spans import PARAMETER, PIECE0, ROWS0, Places, Shape
from shardopt.kernels.twins import WHOLE, Round
from shardopt.rules import Hyper

# columns of a `Parameter` of csrc/step.h; the pointers of the answers follow
FIRST, LAST, MATRICES, HEIGHT, WIDTH, STACK, ROW, COL, OUT, ANSWERS = range(2, 12)


class AskingCall(Call):
    """All parameters of a key in one bucket: filled by `add`, closed once, then `stepping` in every step.

    members: their positions in the bucket, by which they are spoken for.
    """

    def __init__(self, key: Key, function: Any) -> None:
        super().__init__(key.cpp, function)
        self.rounds = key.rounds
        self.about: list[list[int]] = []
        self.views: list[tuple[int, ...]] = []
        self.tables = {by: Table() for by in {"column means" in asked for asked in key.rounds}}
        self.spans_before = 0
        self.whole: list[tuple[Any, Mapping[str, Any], tuple[int, ...]]] = []  # rule, group, GLOBAL view
        self.adjusted: dict[tuple[int, float], Mapping[str, Any]] = {}

    def add(self, item: Any, key: Key, shape: Shape, member: int) -> None:
        super().add(item, key, shape, member)
        local = item.layout.geo.local
        for by, table in self.tables.items():
            table.add(shape.places[by], len(self.views))
        first = self.spans_before
        self.spans_before += len(shape.offsets)
        matrices, rows = (prod(local[:-2]), local[-2]) if len(local) > 1 else (1, 1)
        lines = {part.line: item.state[part.name].data_ptr() for part in shape.parts if part.line}
        about = [first, self.spans_before, matrices, rows, local[-1], len(local) > 2, lines.get("row", 0)]
        self.about.append([len(self.groups) - 1, self.steps[-1], *about, lines.get("column", 0)])
        self.views.append(local)
        self.whole.append((item.recipe.rule, item.group, item.layout.geo.view))

    def numbers_of(self, item: Any) -> Mapping[str, Any]:
        if WHOLE not in self.rounds:
            return item.group
        factor = item.recipe.rule.factor(item.layout.geo.view)
        return self.adjusted.setdefault((id(item.group), factor), ChainMap({"factor": factor}, item.group))

    def close(self) -> None:
        super().close()
        answers = sum(len(asked) for asked in self.rounds)
        self.parameters = np.zeros((len(self.views), ANSWERS + answers + 1), dtype=np.int64)
        self.parameters[:, :OUT] = self.about
        most = max(map(len, self.rounds), default=0)  # Adafactor may ask nothing
        for table in self.tables.values():
            table.close(most)
        self.lay_out()

    def lay_out(self) -> None:
        """Where the sums of every pass are put, and the asks that hold them."""
        sizes = [[sum(size_of(word, view) for word in asked) for view in self.views] for asked in self.rounds]
        self.out = torch.zeros(sum(map(sum, sizes)), dtype=torch.float64)
        begins = np.concatenate(([0], np.cumsum(sizes).ravel()))[:-1].reshape(len(self.rounds), len(self.views))
        self.outs = self.out.data_ptr() + 8 * begins
        self.asks: list[dict[int, tuple[Ask, ...]]] = []
        for asked, starts in zip(self.rounds, begins.tolist()):
            self.asks.append(
                {
                    member: tuple(asks_of(asked, view, self.out, start))
                    for member, view, start in zip(self.members, self.views, starts)
                }
            )

    def stepping(
        self, addresses: np.ndarray, totals: Mapping[str, Any], gradients: Sequence[Tensor], taken: Tensor | None = None
    ) -> Asking:
        """The step of all members, for `shardopt.engine.drive`: yields {position: what it asks}, is sent {position: the
        answers}. addresses: of the gradients of the whole bucket, which are kept alive as long as they are read."""
        numbers = self.numbers(addresses, totals)
        alive: list[Tensor] = []  # what the answers' pointers point to
        column = ANSWERS
        for which, asked in enumerate(self.rounds):
            replies = yield self.asked(which, numbers)
            for row, member in enumerate(self.members):
                answers = [reply.contiguous() for reply in replies[member]]
                self.parameters[row, column : column + len(asked)] = [answer.data_ptr() for answer in answers]
                alive.extend(answers)
            column += len(asked)
        told = [self.told(table, np.empty(0)) for table in self.tables.values()]
        self.function(self.spans, self.tiles, numbers, self.counters, taken, *told[:1])  # either tells whose a span is

    def asked(self, which: int, numbers: list[list[Any]]) -> Mapping[int, Any]:
        """What is asked of every member in a round, worked out; nobody here keeps it."""
        asks: Mapping[int, Any] = self.asks[which]
        self.parameters[:, OUT] = self.outs[which]
        if self.rounds[which] == WHOLE:
            xs = [torch.empty(view) for view in self.views]
            self.parameters[:, OUT] = [x.data_ptr() for x in xs]
            asks = {member: (whole_of(x, *about),) for member, x, about in zip(self.members, xs, self.whole)}
        table = self.tables["column means" in self.rounds[which]]
        scratch = np.empty(table.scratch)
        self.function.sums(which, self.spans, numbers, self.told(table, scratch))
        return asks

    def told(self, table: "Table", scratch: np.ndarray) -> np.ndarray:
        """The twin of `Asked` in csrc/cpu.h."""
        pointers = (table.where.ctypes.data, self.parameters.ctypes.data)
        return np.array([*pointers, len(self.views), table.pieces, scratch.ctypes.data], dtype=np.int64)


class Table:
    """The places of a call's spans for one kind of pieces. scratch: doubles that their sums take."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []
        self.pieces = self.sums = 0

    def add(self, places: Places, parameter: int) -> None:
        rows = places.rows.copy()
        rows[:, PARAMETER] = parameter
        rows[:, PIECE0] += self.pieces
        rows[:, ROWS0 : ROWS0 + 2] += self.sums
        self.rows.append(rows)
        self.pieces, self.sums = self.pieces + places.pieces, self.sums + places.sums

    def close(self, most: int) -> None:
        """No parameter is added any more. most: scalars that a piece adds up."""
        self.where = np.concatenate(self.rows)
        self.scratch = max(self.sums, self.pieces * most)


def whole_of(x: Tensor, rule: Any, group: Any, view: tuple[int, ...]) -> Whole:
    return rule.asked(x, Hyper(group, shape=view))


def size_of(word: str, local: tuple[int, ...]) -> int:
    """How many sums an ask holds."""
    return 0 if word in WHOLE else prod(shape_of_ask(word, local))


def shape_of_ask(word: str, local: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is asked of a parameter of this local view."""
    return {
        "row means": local[:-1],
        "column means": (*local[:-2], local[-1]),
        "means": local[:-2],
        "means of rows": local[:-2],
    }.get(word, ())


OVER: dict[str, Any] = {"row means": -1, "column means": -2, "means": (-2, -1), "means of rows": -2}


def asks_of(asked: Round, local: tuple[int, ...], out: Tensor, start: int) -> Sequence[Ask]:
    """The asks of one round of one parameter, whose sums lie in `out` one after another: the twin of what rules, codecs
    and add-ons yield."""
    found: list[Ask] = []
    for word in asked if asked != WHOLE else ():
        shape = shape_of_ask(word, local)
        sums = out[start : start + prod(shape)].view(shape)
        start += prod(shape)
        over = OVER.get(word, tuple(range(len(local))))
        found.append(Sum(sums, (), over) if word == "sum" else Mean(sums, (), over))
    return found


class Buckets:
    """The calls of every bucket, kept as long as nothing but gradients and numbers changes."""

    def __init__(self) -> None:
        self.known: dict[Any, tuple[list[Any], list[AskingCall], list[int]]] = {}

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
        _, calls, left = self.known[place]
        return calls, left


def made(items: Sequence[Any], found: Sequence[Any]) -> tuple[list[AskingCall], list[int]]:
    calls: dict[str, AskingCall] = {}
    left = []
    for position, (item, runs_with) in enumerate(zip(items, found)):
        if isinstance(runs_with, str):
            left.append(position)
            continue
        key, step, shape = runs_with
        if key.cpp not in calls:
            calls[key.cpp] = AskingCall(key, step)
        calls[key.cpp].add(item, key, shape, position)
    for call in calls.values():
        call.close()
    return list(calls.values()), left
