"""Coefficients of the quintics by name, and the sequence of a given number of steps.

A step maps singular values s to a s + b s^3 + c s^5. The interval that a set leaves after five steps is stated beside
it. A set must be positive on (0, 1]: a negative value REVERSES the update of that singular vector, and momenta of
rank one (batches of one, first steps, adapters) have all their weight at 1. Not every published set is.
"""

import ast
from functools import lru_cache
from typing import NamedTuple
from zlib import crc32

from shardopt.polar.minimax import LIMIT, Triple, minimax
from shardopt.spelling import near

Coefficients = str | Triple | tuple[Triple, ...]
Interval = tuple[float, float]


class Set(NamedTuple):
    """Coefficients; the least and greatest value after five steps for singular values in [1e-2, 1], in [1e-3, 1]."""

    triples: tuple[Triple, ...]
    interval_2: Interval
    interval_3: Interval
    repeats: bool = False  # one triple for every step, never followed by the limit
    steep: bool = False  # rises steeply beyond 1: see `default_safety`


CUSHION = 0.02407327424182761  # of Polar Express

SETS: dict[str, Set] = {
    # Keller Jordan's, torch.optim.Muon's default: the steepest at 0 (485 after five steps), never settles at 1
    "quintic": Set(((3.4445, -4.7750, 2.0315),), (0.682, 1.134), (0.471, 1.202), repeats=True),
    # YouJiacheng's: close to 1 from 1e-2 on, loose below
    "you": Set(
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        (0.978, 1.032),
        (0.475, 1.145),
    ),
    # arXiv 2505.16932, lower edge 1e-3
    "polar_express": Set(minimax(1e-3, 7, CUSHION), (0.876, 1.124), (0.876, 1.124), steep=True),
    # Polar Express as the speed runs of GPT-2 use it: each step shrunk for bfloat16, the first with its norm of 1.02
    "polar_express_bf16": Set(
        (
            (8.156554524902461 / 1.02, -22.48329292557795 / 1.02**3, 15.878769915207462 / 1.02**5),
            (4.042929935166739, -2.808917465908714, 0.5000178451051316),
            (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
            (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
            (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
        ),
        (0.859, 1.141),
        (0.847, 1.141),
    ),
    # arXiv 2506.10935
    "cans": Set(
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
        (0.884, 1.120),
        (0.884, 1.120),
        steep=True,
    ),
}


@lru_cache(maxsize=256)
def schedule(coefficients: Coefficients, steps: int, safety: float = 1.0) -> tuple[Triple, ...]:
    """The triple of every step.

    coefficients: the name of a set; "minimax(lower)" or "minimax(lower, cushion)", made for this number of steps;
    one triple, repeated; or a tuple of triples, the first `steps` of it. Where a set ends early, the limiting triple
    (15/8, -10/8, 3/8) follows. safety s: every step of the set sees singular values divided by s, so that rounding
    does not carry them past 1; the limit needs none. Raises ValueError for anything else.
    """
    if steps < 1 or not safety >= 1:
        raise ValueError(f"got steps={steps} and safety={safety}. Both are at least 1; a usual safety is 1.01.")
    triples, repeats = _triples(coefficients, steps)
    triples = triples * steps if repeats else triples[:steps]
    safe = tuple((a / safety, b / safety**3, c / safety**5) if (a, b, c) != LIMIT else LIMIT for a, b, c in triples)
    return safe + (LIMIT,) * (steps - len(safe))


def _triples(coefficients: Coefficients, steps: int) -> tuple[tuple[Triple, ...], bool]:
    """The set, and whether it repeats."""
    if isinstance(coefficients, str):
        if coefficients in SETS:
            return SETS[coefficients].triples, SETS[coefficients].repeats
        if coefficients.startswith("minimax(") and coefficients.endswith(")"):
            lower, cushion = _numbers(coefficients)
            return minimax(lower, steps, cushion), False
    elif isinstance(coefficients, tuple) and coefficients:
        if len(coefficients) == 3 and all(isinstance(entry, float | int) for entry in coefficients):
            return (coefficients,), True  # type: ignore[return-value]
        if all(isinstance(entry, tuple) and len(entry) == 3 for entry in coefficients):
            return coefficients, False  # type: ignore[return-value]
    raise ValueError(
        f"coefficients are a name ({', '.join(SETS)}), 'minimax(lower)' as in 'minimax(0.001)', a triple (a, b, c) for "
        f"every step or a tuple of triples, got {coefficients!r}{near(coefficients, SETS)}"
    )


def _numbers(call: str) -> tuple[float, float]:
    """Lower edge and cushion of "minimax(lower, cushion)"."""
    try:
        numbers = ast.literal_eval(call.removeprefix("minimax").removesuffix(")") + ",)")
    except (SyntaxError, ValueError):
        numbers = ()
    if len(numbers) not in (1, 2) or not all(isinstance(number, float) for number in numbers):
        raise ValueError(f"minimax takes a lower edge and, if wanted, a cushion, as in 'minimax(0.001)', got {call!r}.")
    return numbers[0], numbers[1] if len(numbers) == 2 else 0.0


def default_safety(coefficients: Coefficients, sixteen_bit: bool) -> float:
    """1.01 for sets fitted up to 1 exactly in 16-bit formats, else 1.

    Rounding carries the largest singular value past 1, where those sets are steep and every step amplifies it:
    minimax(0.001) on a matrix of ones returned 4e11 in bfloat16, and .97 with 1.01.
    """
    fitted = isinstance(coefficients, str) and (coefficients not in SETS or SETS[coefficients].steep)
    return 1.01 if fitted and sixteen_bit else 1.0


def label(coefficients: Coefficients) -> str:
    """A name for keys: the set's own, or a checksum of the numbers."""
    return coefficients if isinstance(coefficients, str) else f"custom_{crc32(repr(coefficients).encode()):08x}"
