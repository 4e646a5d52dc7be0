"""Which C++ struct of `shardopt/csrc` does what a rule, codec, add-on or write policy does, and with which numbers.

A twin is looked up by the exact class: a subclass may compute something else, so it runs the reference.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from shardopt import addons, codecs, rules
from shardopt.addons.variance import beta_of
from shardopt.codecs.dynamic import table
from shardopt.codecs.noise import stream_of
from shardopt.rules import Rule
from shardopt.rules.base import Hyper

MEMORY = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16"}
WIDEST = 4096  # elements of a block that a thread keeps between its two passes


class NoTwin(Exception):
    """Why something runs on the reference; the message is a clause, for users."""


Round = tuple[str, ...]  # what one round asks, by the words of `shardopt.kernels.passes`


WHOLE: Round = ("whole",)
SQUARES: Round = ("row squares",)  # sums of squares of every row, answered by a float a row: see `lines`


LARGEST, LEAST = "largest", "least"  # of every block


class Extremes(NamedTuple):
    """What is asked of a slot whose blocks lie on several ranks: their largest magnitudes and, where `least`, their
    smallest positive values. at: the slot's place among those of the kernel."""

    slot: str
    at: int
    block: int
    least: bool

    @property
    def words(self) -> Round:
        return (LARGEST, LEAST) if self.least else (LARGEST,)


def of_blocks(asked: Round) -> bool:
    """Whether a round asks extremes of blocks."""
    return asked[0] == LARGEST


def sums_rows(asked: Round) -> bool:
    """Whether a round needs the sums of rows."""
    return "row means" in asked or asked == SQUARES


class Twin(NamedTuple):
    """cpp: the struct. numbers: (param group, totals) -> its numbers, floats or 0-d tensors, in the struct's order.
    rounds: what it asks."""

    cpp: str
    numbers: Callable[[Any, Any], list[Any]]
    rounds: tuple[Round, ...] = ()


def flag(value: Any) -> str:
    return "true" if value else "false"


def from_group(*names: str) -> Callable[[Any, Any], list[Any]]:
    """Numbers of the param group by their names; pairs are flattened."""

    def read(group: Any, totals: Any) -> list[Any]:
        found: list[Any] = []
        for name in names:
            value = group[name]
            found.extend(value if isinstance(value, (tuple, list)) else (value,))
        return found

    return read


def nothing(group: Any, totals: Any) -> list[Any]:
    return []


def adamw(rule: rules.AdamW) -> Twin:
    switches = (rule.has_momentum, rule.nesterov, rule.atan2, rule.bias_correction)
    return Twin(f"AdamW<{', '.join(map(flag, switches))}>", from_group("lr", "betas", "eps"))


def sgd(rule: rules.SGD) -> Twin:
    return Twin(f"SGD<{flag(rule.slots())}, {flag(rule.nesterov)}>", from_group("lr", "momentum", "dampening"))


def rmsprop(rule: rules.RMSprop) -> Twin:
    switches = (rule.centered, len(rule.slots()) > 1 + rule.centered, rule.bias_correction)
    return Twin(f"RMSprop<{', '.join(map(flag, switches))}>", from_group("lr", "alpha", "eps", "momentum"))


def adafactor(rule: rules.Adafactor, dtype: torch.dtype) -> Twin:
    raw = rule.momentum == "raw"
    switches = (rule.beta1, raw, rule.beta2 is not None, rule.d, rule.scale_parameter, rule.relative_step)
    decay = ("torch", "scaled", "decoupled").index(rule.decay)

    def numbers(group: Any, totals: Any) -> list[Any]:
        epsilons = rule.epsilons(Hyper(group, dtype=dtype))
        beta1, beta2 = group["beta1"] or 0.0, group["beta2"] or 0.0
        return [group["lr"], group["beta2_decay"], beta2, beta1, group["d"], group["eps"][1], *epsilons]

    asked = ("mean",) * (bool(rule.d) + rule.scale_parameter)
    words = ", ".join(map(flag, (*switches, rule.bias_correction)))
    return Twin(f"Adafactor<{words}, {decay}>", numbers, (asked,) if asked else ())


def muon(rule: rules.Muon) -> Twin:
    """Of Muon and its kin."""
    switches = [rule.accumulate == "ema", rule.nesterov]
    numbers, rounds = ["lr", "momentum", "factor"], [WHOLE, *(SQUARES for _ in rule.lines())]
    if isinstance(rule, rules.AdaMuon):
        numbers += ["beta2", "eps"]
        switches += [rule.sign, rule.atan2, rule.scale == "clip"]
        rounds += [("mean",)] * (rule.scale == "clip")
    elif not isinstance(rule, rules.NorMuon):
        switches += [bool(rule.lines())]
    words = ", ".join(map(flag, switches))
    return Twin(f"{type(rule).__name__}<{words}>", from_group(*numbers), tuple(rounds))


# (rule, dtype of the parameter) -> its twin
RULES: dict[type[Rule], Callable[[Any, torch.dtype], Twin]] = {
    rules.AdamW: lambda rule, dtype: adamw(rule),
    rules.Lion: lambda rule, dtype: Twin("Lion", from_group("lr", "betas")),
    rules.SGD: lambda rule, dtype: sgd(rule),
    rules.RMSprop: lambda rule, dtype: rmsprop(rule),
    rules.Adafactor: adafactor,
    rules.Muon: lambda rule, dtype: muon(rule),
    rules.NorMuon: lambda rule, dtype: muon(rule),
    rules.AdaMuon: lambda rule, dtype: muon(rule),
}


def clip_factor(addon: addons.ClipByGlobalNorm) -> Callable[[Any, Any], list[Any]]:
    return lambda group, totals: [(addon.max_norm / (totals[addon.name].sqrt() + 1e-6)).clamp(max=1.0)]


def mars(addon: addons.Mars, slot: int) -> Twin:
    def numbers(group: Any, totals: Any) -> list[Any]:
        beta = beta_of(Hyper(group))
        return [addon.gamma * beta / (1 - beta)]

    return Twin(f"Mars<{slot}, {flag(addon.clip)}>", numbers, (("sum",),) if addon.clip else ())


# (add-on, the number of its first slot) -> its twin
ADDONS: dict[type[addons.Addon], Callable[[Any, int], Twin]] = {
    addons.ClipByGlobalNorm: lambda addon, slot: Twin("ClipByGlobalNorm", clip_factor(addon)),
    addons.CoupledDecay: lambda addon, slot: Twin("CoupledDecay", from_group("weight_decay")),
    addons.GradientCentralization: lambda addon, slot: Twin("Centralize", nothing, (("row means",),)),
    addons.OrthoGrad: lambda addon, slot: Twin("OrthoGrad", nothing, (("sum", "sum", "sum"), ("sum",))),
    addons.Grams: lambda addon, slot: Twin("Grams", nothing),
    addons.RMSClip: lambda addon, slot: Twin("RMSClip", lambda group, totals: [addon.d], (("mean",),)),
    addons.Cautious: lambda addon, slot: Twin(
        f"Cautious<{flag(addon.count == 'active')}>", lambda group, totals: [addon.floor], (("sum", "sum"),)
    ),
    addons.Mars: mars,
    addons.WeightDecay: lambda addon, slot: Twin("WeightDecay", from_group("weight_decay")),
    addons.CautiousDecay: lambda addon, slot: Twin("CautiousDecay", from_group("weight_decay")),
}

# what is done to every gradient first, by the words of `key_of`
BEFORE = {
    "unscale": Twin("Unscale", lambda group, totals: [totals["grad_scale"]]),
    "zero": Twin("ZeroNonfinite", nothing),
    "maximize": Twin("Maximize", nothing),
}

# codec class -> (struct, what its template is given, in order)
CODECS: dict[type[codecs.Codec], tuple[str, tuple[str, ...]]] = {
    codecs.CODECS["fp32"]: ("Fp32", ()),
    codecs.CODECS["bf16"]: ("Bf16", ("signed", "noise")),
    codecs.CODECS["fp16"]: ("Fp16", ("signed", "noise")),
    codecs.CODECS["int8"]: ("Int8", ("block",)),
    codecs.CODECS["sqrt8"]: ("Sqrt8", ("block",)),
    codecs.CODECS["root4"]: ("Root4", ("block", "noise")),
    codecs.CODECS["fp8"]: ("Fp8", ("block", "signed", "noise")),
    codecs.CODECS["int4"]: ("Int4", ("block",)),
    codecs.CODECS["dyn4"]: ("Dyn4", ("block", "table")),
    codecs.CODECS["dyn8"]: ("Dyn8", ("block", "signed", "table")),
    codecs.CODECS["log8"]: ("Log8", ("block", "noise")),
    codecs.CODECS["log16"]: ("Log16", ("block", "noise")),
    codecs.CODECS["log4"]: ("Log4", ("block", "noise")),
    codecs.CODECS["factored"]: ("Factored", ()),
}
FACTORED: Round = ("row means", "column means", "means", "means of rows")  # what the recurrence of its slot asks


def codec_twin(codec: codecs.Codec, slot: str, across: bool = False) -> str:
    """The struct of a codec in a slot, as C++ text. NoTwin where there is none. across: blocks lie on several ranks."""
    if type(codec) not in CODECS:
        raise NoTwin(f"codec {codec.name} has no native twin")
    block = getattr(codec, "block", 1)
    if block > WIDEST:
        raise NoTwin(f"{codec.describe()} has blocks of more than {WIDEST} elements")
    name, wanted = CODECS[type(codec)]
    words = {
        "block": str(block),
        "signed": flag(codec.slot_signed),
        "noise": f"{flag(codec.noisy)}, {stream_of(slot)}u",
        "table": table_name(codec),
    }
    given = ", ".join(words[word] for word in wanted)
    cpp = f"{name}<{given}>" if given else name
    return f"Across<{cpp}>" if across else cpp


def table_name(codec: codecs.Codec) -> str:
    return {"dyn4": "Dynamic4", "dyn8": f"Dynamic8{'Signed' if codec.slot_signed else ''}"}.get(codec.name, "")


TABLES = {"Dynamic4": (4, True), "Dynamic8Signed": (8, True), "Dynamic8": (8, False)}


def tables_source(cpp: str) -> str:
    """The dynamic maps that a C++ type names, as structs."""
    return "".join(table_source(name) for name in TABLES if f", {name}>" in cpp)


def table_source(name: str) -> str:
    """A dynamic map as a C++ struct, from the codec's own table."""
    entries, midpoints = (t.tolist() for t in table(*TABLES[name], torch.device("cpu")))
    lists = [", ".join(f"{x.hex()}f" for x in values) for values in (entries, midpoints)]
    cells = cells_source(midpoints) if name == "Dynamic4" else ""
    return (
        f"struct {name} {{\n  static constexpr int size = {len(entries)};\n"
        f"  HD static float entry(int i) {{ CONSTANTS x[] = {{{lists[0]}}}; return x[i]; }}\n"
        f"  HD static float midpoint(int i) {{ CONSTANTS x[] = {{{lists[1]}}}; return x[i]; }}\n{cells}}};\n"
    )


REACH = 1 - 2.0**-12  # of the largest root: it lies in the last cell, whatever it is rounded to


def cells_source(midpoints: list[float]) -> str:
    """What `csrc/calm.h` adds to t = 3 + REACH sign(x) root(|x|), in units of 2^-28 beyond 2, so that bits 24 to 27 are
    the code: one word for every sixteenth of t, in which one midpoint lies at most."""
    parting = [round((1 + math.copysign(math.sqrt(abs(x)) * REACH, x)) * 2**28) for x in midpoints]
    words = []
    for cell in range(32):
        first, last = cell << 24, (cell + 1) << 24
        inside = [(code + 1, x) for code, x in enumerate(parting) if first <= x < last]
        assert len(inside) <= 1 and all(first + 2**12 < x < last - 2**12 for _, x in inside)
        code, at = inside[0] if inside else (sum(x < first for x in parting), first)
        words.append(((code << 24) - at) % 2**32)
    listed = ", ".join(f"{x:#x}u" for x in words)
    return (
        f"  static constexpr float reach = {REACH.hex()}f;\n"
        f"  HD static u32 cell(int i) {{ static const u32 x[] = {{{listed}}}; return x[i]; }}\n"
    )
