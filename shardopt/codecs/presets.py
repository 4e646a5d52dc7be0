"""State presets: which codec stores a signed slot and which a non-negative one, by one word."""

from collections.abc import Iterable, Mapping
from typing import Any

from shardopt.asks import Slot
from shardopt.codecs import CODECS, Codec, check_slot, codec
from shardopt.codecs.rows import Rows
from shardopt.spelling import near

# (signed slots, non-negative slots); chosen by paired-seed training runs: docs/quality.md
PRESETS: dict[str, tuple[str, str]] = {
    "fp32": ("fp32", "fp32"),
    "bf16": ("bf16", "bf16"),
    "int8": ("sqrt8", "root4"),
    "int4": ("dyn4", "log4"),
    "factored": ("int8", "factored"),
}


def resolve_state(spec: Any, slots: Iterable[Slot], rule: str) -> tuple[tuple[str, Codec], ...]:
    """The codec of every slot, in slot order.

    spec: a preset's name; a codec (object or name) for all slots; "slot=codec,slot=codec"; or a mapping from slot
    names, or "signed" / "non_negative", to codecs. Slots that a mapping leaves out are fp32. Slots that hold one number
    a row have a format of their own.
    """
    slots = tuple(slots)
    if isinstance(spec, str) and "=" in spec.split("(")[0]:
        spec = dict(pair.split("=", 1) for pair in split_outside(spec))
    elif isinstance(spec, str) and spec in PRESETS:
        spec = dict(zip(("signed", "non_negative"), PRESETS[spec]))
    elif isinstance(spec, (str, Codec)):
        if isinstance(spec, str) and spec.split("(")[0] not in CODECS:
            raise ValueError(
                f"state={spec!r} is neither a preset ({', '.join(PRESETS)}) nor a codec ({', '.join(CODECS)})"
                f"{near(spec.split('(')[0], [*PRESETS, *CODECS])}"
            )
        spec = {"signed": spec, "non_negative": spec}
    if not isinstance(spec, Mapping):
        raise ValueError(f"state is {spec!r}; give a preset, a codec, or a mapping from slot names to codecs")
    known = {slot.name for slot in slots if not slot.rows} | {"signed", "non_negative"}
    if unknown := sorted(set(spec) - known):
        raise ValueError(
            f"state names {', '.join(unknown)}, but the slots of {rule} are "
            f"{', '.join(slot.name for slot in slots if not slot.rows) or 'none'} (or use signed, non_negative)"
            f"{near(unknown[0], known)}"
        )
    resolved: list[tuple[str, Codec]] = []
    for slot in slots:
        if slot.rows:
            resolved.append((slot.name, Rows()))
            continue
        chosen = codec(spec.get(slot.name, spec.get("signed" if slot.signed else "non_negative", "fp32")))
        check_slot(chosen, slot.name, slot.signed, rule)
        resolved.append((slot.name, chosen.for_slot(slot.signed)))
    return tuple(resolved)


def split_outside(text: str) -> list[str]:
    """Split at commas that are not inside parentheses."""
    pieces, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "," and not depth:
            pieces.append("")
        else:
            pieces[-1] += char
    return [piece.strip() for piece in pieces if piece.strip()]
