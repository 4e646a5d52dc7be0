"""What is compiled, and compiling ahead of time: `python -m shardopt.kernels` and `python -m shardopt.kernels build`.

    python -m shardopt.kernels build --state int8 --dtype bf16 --rounding stochastic --arch cpu,sm_80,sm_90,sm_100

A cluster builds once into a shared folder ($SHARDOPT_CACHE) and every rank finds it there.
"""

import argparse
import ast
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch

from shardopt.codecs.sendable import wire_codec
from shardopt.kernels import cpu, cuda, wire
from shardopt.kernels.cache import NoCompiler, cache_folder
from shardopt.kernels.key import Key, NoTwin, key_at
from shardopt.piped import quiet
from shardopt.recipe import Recipe
from shardopt.rules import RULES, Rule

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MOMENTA = "signed=int8,non_negative=root4"
USUAL = {"adafactor": "factored", "muon": MOMENTA, "normuon": MOMENTA, "adamuon": MOMENTA}  # the presets'; else int8
VIEWS = ((1 << 20,), (4096, 4096))  # a vector, which keeps fp32 state, and a matrix


def listing() -> None:
    """Every kernel of the cache: its file, seconds to compile, registers and spills where a GPU's, key."""
    print(f"cache: {cache_folder()}")
    for note in sorted(cache_folder().glob("*.json")):
        facts = json.loads(note.read_text())
        report = facts.get("report", {})
        spilled = report.get("spill_stores", 0) + report.get("spill_loads", 0)
        usage = f"{report['registers']:3} registers, {spilled} bytes spilled" if report else "CPU"
        arch = next((o.split("=")[1] for o in facts.get("options", []) if "gpu-architecture" in o), "")
        print(f"{note.stem[:12]}  {facts['seconds']:7.3f} s  {usage:30} {arch:7} {facts['key']}")


def rule_of(options: argparse.Namespace) -> Rule:
    try:
        return RULES[options.rule](**dict(options.option))
    except TypeError as error:
        known = ", ".join(field.name for field in fields(RULES[options.rule]))
        raise ValueError(f"--option: {options.rule} has {known} ({error})") from error


def keys(options: argparse.Namespace) -> list[Key]:
    """The kernels that parameters of one recipe need, matrices and vectors. NoTwin where there are none."""
    rule = rule_of(options)
    recipe = Recipe(rule, options.state or USUAL.get(options.rule, "int8"), options.addons, options.rounding)
    p, g = DTYPES[options.dtype], DTYPES[options.grad_dtype or options.dtype]
    found = [key_at(recipe, view, p, g) for view in VIEWS if len(view) > 1 or rule.unfit(view) is None]
    return list(dict.fromkeys(found))


def option(text: str) -> tuple[str, Any]:
    """From `nesterov=True`."""
    name, _, value = text.partition("=")
    try:
        return name, ast.literal_eval(value)
    except (SyntaxError, ValueError) as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not NAME=VALUE with a literal, as nesterov=True or scale='clip'"
        ) from error


def build(options: argparse.Namespace) -> None:
    archs = options.arch.split(",")
    if wrong := [arch for arch in archs if not re.fullmatch(r"cpu|sm_[1-9]\d+[af]?", arch)]:
        raise ValueError(f"--arch {wrong[0]!r} is neither cpu nor a GPU's, such as sm_80, sm_90 or sm_100")
    formats = [wire_codec(spec) for spec in dict.fromkeys(rule_of(options).formats()) if spec != "fp32"]
    for arch in archs:
        sent: list[Any] = [wire.source_of(codec) for codec in formats if wire.fits(codec, arch == "cpu")]
        for key in keys(options) + sent:
            entry = cpu.entry_of(key) if arch == "cpu" else cuda.entry_of(key, arch, options.fast)
            known = entry.path.exists()
            cpu.library(key) if arch == "cpu" else cuda.compiled(key, arch, options.fast)
            took = "there already" if known else f"{entry.facts()['seconds']:11.3f} s"
            print(f"{arch:7} {took:13}  {key.words}")


@quiet
def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0; 2 where nothing was built, with the reason in one line."""
    parser = argparse.ArgumentParser(prog="python -m shardopt.kernels", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", nargs="?", choices=("list", "build"), default="list")
    parser.add_argument("--rule", choices=sorted(RULES), default="adamw")
    parser.add_argument("--option", action="append", default=[], type=option,
                        metavar="NAME=VALUE", help="of the rule, e.g. nesterov=True")  # fmt: skip
    parser.add_argument("--state", help="default: that of the optimizer of this name")
    parser.add_argument("--addons", nargs="*", default=["decay"], help="all of them, the decay too")
    parser.add_argument("--rounding", default="nearest")
    parser.add_argument("--dtype", choices=sorted(DTYPES), default="fp32", help="of parameters")
    parser.add_argument("--grad-dtype", choices=sorted(DTYPES), help="of gradients, if another")
    parser.add_argument("--arch", default="cpu", help="comma-separated: cpu, sm_80, sm_90, sm_100, ...")
    parser.add_argument("--fast", action="store_true", help="GPU kernels with approximate division in the direction")
    options = parser.parse_args(arguments)
    try:
        listing() if options.what == "list" else build(options)
    except (NoTwin, NoCompiler, ValueError) as why:
        print("nothing was built:", " ".join(str(why).split()), file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
