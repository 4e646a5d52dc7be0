"""What a rule, codec or add-on yields because only the whole parameter knows the answer.

An ask holds a LOCAL tensor in the parameter's view (see `shardopt.codecs.geometry`): (..., rows, cols).
Whoever drives the generator sends the answer back; the asker never learns how many ranks there are.

Answers keep no reduced dimension. What is reduced to a scalar comes back as a 0-d float64 tensor (which does
not promote the float32 tensors it meets), everything else as float32.
"""

from collections.abc import Generator
from typing import Any, NamedTuple

from torch import Tensor

Dims = int | tuple[int, ...] | None
EVERYWHERE = ("everywhere",)  # as `over`: every mesh axis, replicas too; for flags on which all ranks must agree


class Sum(NamedTuple):
    """Sum of `x` over its dims `dim` (None: all), then over all shards of the view's dims `over`.

    `over` defaults to `dim`. It differs where x is not shaped like the view: for a vector of rows,
    (..., rows), `Sum(v, dim=-1, over=-2)` adds up all rows of the parameter, wherever they are.
    `dim=()` says that x holds float64 sums of the local shard already; then `over` must be given.
    """

    x: Tensor
    dim: Dims = None
    over: Dims | tuple[str] = None


class Mean(NamedTuple):
    """Like `Sum`, divided by the GLOBAL number of elements along `over`.

    blocks: rows of every block of the view's rows (heads, fused q, k, v); with dim=(-2, -1). The means are of blocks,
    and every local row is told its own block's: (..., rows).
    """

    x: Tensor
    dim: Dims = None
    over: Dims = None
    blocks: tuple[int, ...] = ()


class Max(NamedTuple):
    """Elementwise maximum of `x` over all shards of the view's dims `over`; x is already reduced locally."""

    x: Tensor
    over: Dims = None


class Total(NamedTuple):
    """Sum of `x`, the 0-d float64 sum of one local shard, over all parameters; only before the rules."""

    x: Tensor


class Wire(NamedTuple):
    """Codec strings in which a matrix travels to its owner and its result back; encoded on one device as on many."""

    there: str = "fp32"
    back: str = "fp32"


class Whole(NamedTuple):
    """`work` of every matrix (last two dims) of the whole parameter, cut like x; announced by `Rule.whole`.

    work: a `shardopt.polar.Orthogonalizer`, (..., rows, cols) -> the same shape. mode: "full", every matrix is brought
    to one owner and its result back, bitwise the same on every mesh; "gram", the Gram matrix of the small side is
    summed and the result is worked out locally; "auto", the planner chooses between the two; "local", every rank
    works on what it holds: a result that depends on the mesh.
    """

    x: Tensor
    work: Any
    wire: Wire = Wire()
    mode: str = "full"


class Slot(NamedTuple):
    """A named state tensor, shaped like the parameter or, with `rows`, like its rows. signed: can be negative."""

    name: str
    signed: bool = True
    rows: bool = False


Ask = Sum | Mean | Max | Total
Asking = Generator[Any, Any, Any]  # yields an Ask or a tuple of them, is sent the answer(s), returns its result


def together(*generators: Asking) -> Asking:
    """Run generators in lock step, so that what they ask shares its rounds; returns the tuple of their results."""
    results: list[Any] = [None] * len(generators)
    replies: dict[int, Any] = {i: None for i in range(len(generators))}
    while replies:
        asked: dict[int, Any] = {}
        for i, reply in replies.items():
            try:
                asked[i] = generators[i].send(reply)
            except StopIteration as stop:
                results[i] = stop.value
        if not asked:
            break
        flat = [ask for group in asked.values() for ask in as_tuple(group)]
        answers = iter((yield tuple(flat)))
        replies = {}
        for i, group in asked.items():
            got = tuple(next(answers) for _ in as_tuple(group))
            replies[i] = got if is_group(group) else got[0]
    return tuple(results)


def result_of(asking: Asking) -> Any:
    """What a generator returns that has nothing to ask."""
    try:
        asked = next(asking)
    except StopIteration as stop:
        return stop.value
    raise AssertionError(f"{asked} is asked where nothing may be")


def is_group(asked: Any) -> bool:
    """Whether a yield holds several asks (a plain tuple) or one (every ask is a NamedTuple)."""
    return type(asked) is tuple


def as_tuple(asked: Any) -> tuple[Ask, ...]:
    return asked if is_group(asked) else (asked,)
