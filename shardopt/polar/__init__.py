"""Orthogonalizers: the polar factor of a matrix by matrix products, for Muon and its relatives."""

from dataclasses import fields
from functools import lru_cache

from shardopt.polar.base import Orthogonalizer
from shardopt.polar.coefficients import SETS, schedule
from shardopt.polar.gram import Gram
from shardopt.polar.low_rank import LowRank
from shardopt.polar.minimax import minimax
from shardopt.polar.newton_schulz import NewtonSchulz
from shardopt.polar.split import Split
from shardopt.spelling import near, spelled

ORTHOGONALIZERS: dict[str, Orthogonalizer] = {
    **{name: NewtonSchulz(coefficients=name) for name in SETS},
    "newton_schulz": NewtonSchulz(),
    "gram": Gram(),
    "minimax": Gram(coefficients="minimax(0.001)", norm="tight"),  # nearer to 1 than quintic on every spectrum
    "fast": Gram(coefficients="minimax(0.005)", norm="tight", steps=4),  # the same on spectra of one magnitude
    "low_rank": LowRank(),
}
CLASSES: dict[str, type[Orthogonalizer]] = {cls.name: cls for cls in (NewtonSchulz, Gram, LowRank, Split)}


def orthogonalizer(spec: Orthogonalizer | str) -> Orthogonalizer:
    """The orthogonalizer of a name, of a name with options ("newton_schulz(steps=4)", as `describe` writes), or itself.

    With options the name is that of a class; ValueError for what it does not know.
    """
    return spec if isinstance(spec, Orthogonalizer) else read(spec)


@lru_cache(maxsize=256)
def read(spec: str) -> Orthogonalizer:
    """The orthogonalizer of a text; rules hold texts and ask for their orthogonalizer in every step."""
    try:
        name, options = spelled(spec, nested=("work",))
    except ValueError as error:
        raise ValueError(
            f"orthogonalizer: {error}. Names are {', '.join(ORTHOGONALIZERS)}{near(spec, ORTHOGONALIZERS)}"
        ) from None
    if name not in (CLASSES if options else ORTHOGONALIZERS):
        if options and name in ORTHOGONALIZERS:
            made = type(ORTHOGONALIZERS[name]).name
            raise ValueError(f"{name} is a name for given options and takes none (from {spec!r}); write {made}(...)")
        classes = f"{', '.join(CLASSES)} with options, as newton_schulz(coefficients='polar_express', steps=6)"
        raise ValueError(
            f"no orthogonalizer is named {name!r} (from {spec!r}). Use one of {', '.join(ORTHOGONALIZERS)}; an object "
            f"of shardopt.polar; or {classes}{near(name, {**ORTHOGONALIZERS, **CLASSES})}"
        )
    if not options:
        return ORTHOGONALIZERS[name]
    known = [field.name for field in fields(CLASSES[name])]
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(
            f"{name} has no option {', '.join(unknown)} (from {spec!r}); it has "
            f"{', '.join(known)}{near(unknown[0], known)}"
        )
    if "work" in options:
        options["work"] = orthogonalizer(options["work"])
    return CLASSES[name](**options)


__all__ = [
    "ORTHOGONALIZERS",
    "SETS",
    "Gram",
    "LowRank",
    "NewtonSchulz",
    "Orthogonalizer",
    "Split",
    "minimax",
    "orthogonalizer",
    "schedule",
]
