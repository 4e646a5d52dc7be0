"""What one round asks, by the words of a key: how many sums that takes, and the asks that hold them."""

from collections.abc import Sequence
from math import prod
from typing import Any

from torch import Tensor

from shardopt.asks import Ask, Mean, Sum, Whole
from shardopt.kernels.twins import LARGEST, LEAST, SQUARES, WHOLE, Round, of_blocks, sums_rows
from shardopt.rules import Hyper


def values_of(asked: Round) -> int:
    """The sums of a whole piece that a round needs."""
    if "column means" in asked:
        return 1
    return 0 if sums_rows(asked) or asked == WHOLE or of_blocks(asked) else len(asked)


def whole_of(x: Tensor, rule: Any, group: Any, geo: Any) -> Whole:
    return rule.asked(x, Hyper(group, shape=geo.view))


def rows_at(out: Tensor, start: int, view: tuple[int, ...]) -> Tensor:
    """The sums of the rows of a parameter of this local view, where they begin at `start`."""
    return out[start : start + prod(view[:-1])].view(view[:-1])


def size_of(word: str, local: tuple[int, ...]) -> int:
    """How many sums an ask holds."""
    return 0 if word in (*WHOLE, LARGEST, LEAST) else prod(shape_of_ask(word, local))


def shape_of_ask(word: str, local: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of what is asked of a parameter of this local view."""
    return {
        "row means": local[:-1],
        "row squares": local[:-1],
        "column means": (*local[:-2], local[-1]),
        "means": local[:-2],
        "means of rows": local[:-2],
    }.get(word, ())


OVER: dict[str, Any] = {"row means": -1, "column means": -2, "means": (-2, -1), "means of rows": -2}


def asks_of(asked: Round, local: tuple[int, ...], out: Tensor, start: int) -> Sequence[Ask]:
    """The asks of one round of one parameter, whose sums lie in `out` one after another: the twin of what rules, codecs
    and add-ons yield."""
    found: list[Ask] = []
    for word in () if asked in (WHOLE, SQUARES) or of_blocks(asked) else asked:
        shape = shape_of_ask(word, local)
        sums = out[start : start + prod(shape)].view(shape)
        start += prod(shape)
        over = OVER.get(word, tuple(range(len(local))))
        found.append(Sum(sums, (), over) if word == "sum" else Mean(sums, (), over))
    return found
