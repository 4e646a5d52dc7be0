"""Remez exchange: odd quintics whose composition carries [lower, 1] closest to 1, for any lower edge and steps."""

from fractions import Fraction
from functools import lru_cache
from math import sqrt

Triple = tuple[float, float, float]  # a, b, c of a x + b x^3 + c x^5

LIMIT: Triple = (15 / 8, -10 / 8, 3 / 8)  # the quintic that is flat to third order at 1, where every sequence ends
NARROW = 1e-6  # an interval of this relative half-width is 1 for every purpose: the limit then errs by 1e-18


@lru_cache(maxsize=256)
def minimax(lower: float, steps: int, cushion: float = 0.0) -> tuple[Triple, ...]:
    """The coefficients of `steps` quintics for singular values in [lower, 1] (Polar Express, arXiv 2505.16932).

    Every step is the best odd quintic for the interval that the steps before it leave, which makes the composition
    the best of its form. cushion: a step is fitted to [max(lower, cushion upper), upper] and then recentred on the
    true interval; it costs accuracy and keeps the middle of wide intervals away from 0 (2.4 % in the paper).
    The values stay positive on (0, 1]: above lower as the error is below 1, below it as the slope at 0 is positive.
    Raises ValueError unless 0 < lower < 1, steps >= 1 and 0 <= cushion < 1.
    """
    if not (0 < lower < 1 and steps >= 1 and 0 <= cushion < 1):
        raise ValueError(
            f"minimax got lower={lower}, steps={steps}, cushion={cushion}. It needs 0 < lower < 1 (the smallest "
            "singular value that counts, relative to the norm), steps >= 1 and 0 <= cushion < 1."
        )
    low, high, triples = lower, 1.0, []
    for _ in range(steps):
        triple = _quintic(max(low, cushion * high), high)
        recentre = 2 / (value(triple, low) + value(triple, high))
        triple = (triple[0] * recentre, triple[1] * recentre, triple[2] * recentre)
        triples.append(triple)
        low = value(triple, low)
        high = 2 - low
    return tuple(triples)


def value(triple: Triple, x: float) -> float:
    """The quintic at x."""
    a, b, c = triple
    return x * (a + x * x * (b + x * x * c))


def _quintic(low: float, high: float) -> Triple:
    """The odd quintic with the least max |p - 1| on [low, high].

    p - 1 takes its extremes with alternating signs at low, at two critical points q < r, and at high. Given q and r,
    three differences of these values are linear in (a, b, c); given those, p' = 0 gives q and r.
    """
    if high - low < NARROW * (high + low):
        middle = (high + low) / 2
        return LIMIT[0] / middle, LIMIT[1] / middle**3, LIMIT[2] / middle**5
    q, r = low + (high - low) / 4, low + (high - low) * 3 / 4
    for _ in range(100):
        a, b, c = _level(low, q, r, high)
        root = sqrt(9 * b * b - 20 * a * c)
        before = q, r
        q, r = sqrt((-3 * b - root) / (10 * c)), sqrt((-3 * b + root) / (10 * c))
        if abs(q - before[0]) + abs(r - before[1]) <= 1e-15 * high:
            break
    return a, b, c


def _level(*points: float) -> Triple:
    """a, b, c with p(x_i) = 1 - (-1)^i e for some e, at four points. Rational: narrow intervals are ill-conditioned."""
    rows = []
    for sign, point in zip((1, -1, 1, -1), points):
        x = Fraction(point)
        rows.append([x, x**3, x**5, Fraction(sign), Fraction(1)])
    for k in range(4):  # Gauss-Jordan; x > 0 distinct, so that no pivot is 0
        rows[k] = [entry / rows[k][k] for entry in rows[k]]
        for i in range(4):
            if i != k:
                rows[i] = [entry - rows[i][k] * pivot for entry, pivot in zip(rows[i], rows[k])]
    return float(rows[0][4]), float(rows[1][4]), float(rows[2][4])
