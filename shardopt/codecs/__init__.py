"""The codecs: storage formats of state tensors, by name."""

from dataclasses import fields

from shardopt.codecs.base import Codec, Part, Parts
from shardopt.codecs.block import Fp8, Int8, Root4, Sqrt8
from shardopt.codecs.dynamic import Dyn4, Dyn8
from shardopt.codecs.factored import Factored
from shardopt.codecs.geometry import Geometry, view_shape
from shardopt.codecs.log import Log4, Log8, Log16
from shardopt.codecs.packed import Int4
from shardopt.codecs.plain import Bf16, Fp16, Fp32
from shardopt.codecs.rows import Rows
from shardopt.spelling import near, spelled

CODECS: dict[str, type[Codec]] = {
    cls.name: cls for cls in (Fp32, Bf16, Fp16, Int8, Sqrt8, Dyn8, Root4, Log8, Log16, Int4, Dyn4, Log4, Fp8, Factored)
}

FIXED: dict[str, type[Codec]] = {Rows.name: Rows}  # formats that a slot's shape decides, never the user


def codec(spec: Codec | str) -> Codec:
    """The codec of a name ("int8"), of a name with options ("int8(block=128)", as `describe` writes) or of itself."""
    if isinstance(spec, Codec):
        return spec
    try:
        name, options = spelled(spec)
    except (ValueError, AttributeError):
        raise ValueError(
            f"a codec is a Codec, a name or 'name(option=value, ...)', got {spec!r}. Write e.g. 'int8(block=128)'."
        ) from None
    known_codecs = CODECS | FIXED
    if name not in known_codecs:
        raise ValueError(
            f"no codec is named {name!r} (from {spec!r}). Use one of {', '.join(CODECS)}{near(name, CODECS)}"
        )
    allowed = [f.name for f in fields(known_codecs[name]) if not f.name.startswith("_")]
    for option in options:
        if option not in allowed:
            known = f"has the options {', '.join(allowed)}" if allowed else "has no options"
            raise ValueError(
                f"{name} got the option {option!r} (from {spec!r}), but {known}. Leave {option!r} out"
                f"{near(option, allowed)}"
            )
    return known_codecs[name](**options)


def check_slot(codec: Codec, slot: str, signed: bool, rule: str) -> None:
    """Raise a ValueError where the codec cannot store a slot of this kind."""
    if codec.signed if signed else codec.non_negative:
        return
    kinds = {True: "signed", False: "non-negative"}
    fit = [name for name, cls in CODECS.items() if (cls.signed if signed else cls.non_negative)]
    raise ValueError(
        f"{codec.name} stores {kinds[not signed]} slots; slot {slot} of {rule} is {kinds[signed]}. "
        f"Use {', '.join(fit[:-1])} or {fit[-1]}."
    )


__all__ = ["CODECS", "Codec", "Geometry", "Part", "Parts", "check_slot", "codec", "view_shape"]
