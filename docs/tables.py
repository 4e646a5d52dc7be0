"""Writes README's tables from the registries: `python docs/tables.py` prints them, `--write` puts them in place."""

import re
import sys
from pathlib import Path
from typing import Any

from shardopt import presets
from shardopt.addons import ADDONS
from shardopt.codecs import CODECS, Fp32, codec
from shardopt.codecs.presets import PRESETS

README = Path(__file__).parent.parent / "README.md"
SHAPE = (4096, 4096)


def first_line(item: Any) -> str:
    """The first sentence of a docstring, on one line."""
    text = " ".join((item.__doc__ or "").split("\n\n")[0].split())
    return re.split(r"(?<=[.;:])\s", text)[0].rstrip(".;:").replace("|", "\\|")


def bytes_per_parameter(spec: Any) -> float:
    """Of one slot of a 4096 x 4096 matrix, scales included."""
    parts = codec(spec).parts(SHAPE)
    total = 0.0
    for part in parts:
        size = 1
        for n in part.shape(SHAPE, SHAPE):
            size *= n
        total += size * part.dtype.itemsize
    return total / (SHAPE[0] * SHAPE[1])


def kinds(cls: Any) -> str:
    return " and ".join(word for word, fits in (("signed", cls.signed), ("non-negative", cls.non_negative)) if fits)


def optimizers() -> str:
    rows = ["| optimizer | default state | what it is |", "|---|---|---|"]
    for cls in presets.PRESETS.values():
        told = [getattr(base.__init__, "__kwdefaults__", None) or {} for base in cls.__mro__]
        state = next((defaults["state"] for defaults in told if "state" in defaults), "-")
        rows.append(f"| `{cls.__name__}` | `{state}` | {first_line(cls)} |")
    return "\n".join(rows)


def codecs() -> str:
    rows = ["| codec | slots | bytes a parameter (4096 x 4096) | format |", "|---|---|---|---|"]
    for name, cls in CODECS.items():
        formula = "as it is" if cls is Fp32 else first_line(cls)
        rows.append(f"| `{name}` | {kinds(cls)} | {bytes_per_parameter(name):.4f} | {formula} |")
    return "\n".join(rows)


def states() -> str:
    rows = ["| `state=` | signed slots | non-negative slots | AdamW, bytes a parameter |", "|---|---|---|---|"]
    for name, (signed, second) in PRESETS.items():
        total = bytes_per_parameter(signed) + bytes_per_parameter(second)
        rows.append(f'| `"{name}"` | `{signed}` | `{second}` | {total:.4f} |')
    return "\n".join(rows)


def addons() -> str:
    rows = ["| add-on | stage | what it does |", "|---|---|---|"]
    for name, cls in ADDONS.items():
        rows.append(f"| `{cls.__name__}` (`{name}`) | {cls.stage} | {first_line(cls)} |")
    return "\n".join(rows)


TABLES = {"optimizers": optimizers, "states": states, "codecs": codecs, "addons": addons}


def filled(text: str) -> str:
    """`text` with every block between <!-- table NAME --> and <!-- end --> made anew."""
    for name, make in TABLES.items():
        text = re.sub(
            rf"(<!-- table {name} -->\n).*?(<!-- end -->)",
            lambda m, make=make: m[1] + make() + "\n" + m[2],  # type: ignore[misc]
            text,
            flags=re.S,
        )
    return text


if __name__ == "__main__":
    if "--write" in sys.argv:
        README.write_text(filled(README.read_text()))
    else:
        print("\n\n".join(make() for make in TABLES.values()))
