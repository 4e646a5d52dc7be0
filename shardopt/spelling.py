"""Names with options as people and checkpoints spell them, `int8(block=128)`; counts and bytes as people read them."""

import ast
from collections.abc import Collection, Iterable, Sequence
from difflib import get_close_matches
from threading import Lock
from typing import Any

PARSING = Lock()  # CPython 3.11 counts the depth of its parser in one place for all threads


def spelled(text: str, nested: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """Name and options; only literals are read, nothing is evaluated. Options in `nested` come as they are spelled.

    ValueError where the text is neither a name nor a call with keywords.
    """
    try:
        with PARSING:
            node = ast.parse(text.strip(), mode="eval").body
        call = node if isinstance(node, ast.Call) else ast.Call(node, [], [])
        if isinstance(call.func, ast.Name) and not call.args and all(k.arg for k in call.keywords):
            return call.func.id, {
                str(k.arg): ast.unparse(k.value) if k.arg in nested else ast.literal_eval(k.value)
                for k in call.keywords
            }
    except (SyntaxError, ValueError, AttributeError, TypeError):
        pass
    raise ValueError(f"{text!r} is neither a name nor 'name(option=value, ...)'")


def near(word: Any, known: Iterable[str], cutoff: float = 0.6) -> str:
    """The end of an error that lists what is known: `; did you mean 'int8'?` where a name is much like the word."""
    names = {name.lower(): name for name in known}
    found = get_close_matches(word.lower(), names, n=1, cutoff=cutoff) if isinstance(word, str) else []
    return f"; did you mean {names[found[0]]!r}?" if found else ""


def choice(name: str, value: Any, allowed: Collection[str]) -> None:
    """ValueError, which lists what is allowed, unless the value is one of it."""
    if value not in tuple(allowed):
        raise ValueError(f"{name} is {value!r}; it must be one of {', '.join(allowed)}{near(value, allowed)}")


def first_of(names: Sequence[str], most: int = 1) -> str:
    """`layers.0.wq.weight and 11 more`."""
    return ", ".join(names[:most]) + (f" and {len(names) - most:,} more" if len(names) > most else "")


def counted(count: int, one: str, more: str = "") -> str:
    """`1 bucket`, `1,200 buckets`; more: the plural that is not made with an s."""
    return f"{count:,} {one if count == 1 else more or one + 's'}"


def in_bytes(number: float) -> str:
    """To three digits: `167 MB`."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
