"""Muon and its kin: a momentum, orthogonalized as a whole matrix, wherever its shards are."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any, ClassVar

import torch
from torch import Tensor

from shardopt.asks import Asking, Mean, Slot, Sum, Whole, Wire
from shardopt.polar import SETS, NewtonSchulz, Orthogonalizer, Split, orthogonalizer
from shardopt.rules.base import Hyper, Rule, check
from shardopt.spelling import choice, counted, near

MODES = ("full", "gram", "auto", "local", "periodic")
ADJUSTMENTS = ("original", "match_rms_adamw", "spectral", "rms_rescale", "none")
TORCHS = {"ns_coefficients": "coefficients", "ns_steps": "steps", "eps": "eps"}  # torch.optim.Muon's, NewtonSchulz's
SHOWN = 4  # shapes whose cut `explain` tells
WIRES = {  # there and back; blocks as small as the scales' bytes allow, since blocks of a wire are no state
    "exact": Wire("fp32", "fp32"),
    "bf16": Wire("bf16", "bf16"),
    "int8": Wire("int8(block=128)", "int8(block=128)"),
    "int8+int4": Wire("int8(block=128)", "int4(block=64)"),
}


@dataclass(frozen=True, kw_only=True)
class Muon(Rule):
    """Muon (Jordan 2024; arXiv 2502.16982) on the whole matrix, as torch.optim.Muon on one device.

    momentum_buffer = momentum momentum_buffer + (1 - momentum) g                  accumulate="ema"
    x  = momentum momentum_buffer + (1 - momentum) g   (nesterov), or momentum_buffer
    o  = the polar factor of x, by `orthogonalizer`; of every matrix of a stack, of every block of `split` rows
    p -= lr adjust o + lr weight_decay p                                the decay's rate is not adjusted

    accumulate="sum": momentum_buffer = momentum momentum_buffer + g, x = g + momentum momentum_buffer: the same o.
    adjust_lr, with the GLOBAL rows and cols (of a block): "original" sqrt(max(1, rows / cols)), "match_rms_adamw"
    0.2 sqrt(max(rows, cols)), "spectral" sqrt(rows / cols), "rms_rescale" 0.2 / RMS(o), "none" 1.
    split: None, or rows of a block, or the rows of every block: heads, fused q, k, v.
    wire: "exact", "bf16", "int8", "int8+int4", or codecs "there+back": how x and o travel; a part of the maths, so
    that every mesh gives the bits of one device. mode: "full" (whole matrices), "gram" (tall or wide matrices cut on
    their long side: only the small Gram matrix is summed; nothing is encoded, so that the update differs from that of
    "full" by the wire's rounding), "auto" (a plan by cost chooses between these two); and, by nature other algorithms
    whose result DEPENDS ON THE MESH: "local" (every rank its shard), "periodic" (full in every `period`-th step, local
    between: MuonBP, arXiv 2510.16981).

    Slots: momentum_buffer (signed). Asks one Whole.
    """

    name: ClassVar[str] = "muon"
    asks: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("lr", "momentum", "phase")
    of_state: ClassVar[tuple[str, ...]] = ("accumulate",)
    aliases: ClassVar[tuple[str, ...]] = ("adjust_lr_fn", *TORCHS)
    lr: Any = 1e-3
    momentum: Any = 0.95
    phase: int = 0  # of "periodic": the next step's place in its period; a number of the group, so that it is saved
    nesterov: bool = True
    accumulate: str = "ema"
    orthogonalizer: Any = "newton_schulz"
    adjust_lr: str = "original"
    split: Any = None
    wire: str = "int8"
    mode: str = "full"
    period: int = 1

    def __post_init__(self) -> None:
        check("lr", self.lr, 0.0)
        check("momentum", self.momentum, 0.0, 1.0, open_high=True)
        for name, allowed in (("accumulate", ("ema", "sum")), ("adjust_lr", ADJUSTMENTS), ("mode", MODES)):
            choice(name, getattr(self, name), allowed)
        if type(self.period) is not int or (self.mode == "periodic") != (self.period > 1):
            raise ValueError(
                f"mode is {self.mode!r} and period {self.period!r}; give mode='periodic' an integer above 1, as "
                "period=5, and no other mode any"
            )
        if isinstance(self.split, list):
            object.__setattr__(self, "split", tuple(self.split))
        sizes = self.split if isinstance(self.split, tuple) else (1 if self.split is None else self.split,)
        if not sizes or any(type(rows) is not int or rows < 1 for rows in sizes):
            raise ValueError(
                f"split is {self.split!r}; give the rows of a block, an integer of at least 1, or a tuple of such"
            )
        if self.split is not None and self.mode in ("local", "periodic"):
            raise ValueError(f"mode {self.mode!r} orthogonalizes shards, which know no blocks; drop split or the mode")
        wire_of(self.wire)
        work = orthogonalizer(self.orthogonalizer)
        object.__setattr__(self, "orthogonalizer", work.describe())
        if self.mode in ("gram", "auto") and (self.split is not None or not hasattr(work, "gram_factor")):
            raise ValueError(
                f"mode {self.mode!r} needs a Gram form, which {work.name} has not, nor any split. Use "
                "orthogonalizer='gram' or 'minimax' without split, or mode='full'"
            )

    def defaults(self) -> dict[str, Any]:
        numbers = super().defaults()
        return numbers if self.mode == "periodic" else {name: x for name, x in numbers.items() if name != "phase"}

    def given(self, group: Mapping[str, Any]) -> dict[str, Any]:
        """torch.optim.Muon's names too; `eps` is the iteration's where the rule has no number of that name."""
        mine, unheard = orthogonalizer(self.orthogonalizer), TORCHS if "orthogonalizer" in group else self.numbers
        said = {name: group[name] for name in self.aliases if name in group and name not in unheard}
        if set(said) & set(TORCHS) and not isinstance(mine, NewtonSchulz):
            raise ValueError(f"{', '.join(TORCHS)} belong to a Newton-Schulz, which {mine.describe()!r} is not")
        return super().given(group) | translated(said, mine)

    def options_of(self, saved: Mapping[str, Any]) -> dict[str, Any]:
        """torch.optim.Muon's momentum is an EMA, its iteration a Newton-Schulz; its eps only guards 0 / 0."""
        found = super().options_of(saved)
        if "ns_steps" in saved and "recipe" not in saved:
            told = {"adjust_lr_fn": None, **saved, "ns_steps": int(saved["ns_steps"])}
            told.pop("eps", None)
            found |= translated(told, orthogonalizer(self.orthogonalizer)) | {"accumulate": "ema"}
        return found

    def slots(self) -> tuple[Slot, ...]:
        return (Slot("momentum_buffer"),)

    def formats(self) -> tuple[str, ...]:
        return tuple(wire_of(self.wire))

    def unfit(self, view: tuple[int, ...]) -> str | None:
        if len(view) < 2:
            return (
                f"is a vector, but {self.name} orthogonalizes matrices; give vectors, embeddings and heads to a group "
                "with another recipe, or let shardopt.build_optimizer route them"
            )
        if sum(blocks(self.split, view[-2])) != view[-2]:
            if isinstance(self.split, int):
                return f"has {view[-2]} rows, which split={self.split} does not divide"
            return f"has {view[-2]} rows, but split={self.split} adds up to {sum(self.split)}"
        return None

    def whole(self, view: tuple[int, ...]) -> tuple[Orthogonalizer, Wire, str]:
        """What `update` will ask for a parameter of this GLOBAL view: work, wire and mode, for the planner."""
        work = orthogonalizer(self.orthogonalizer)
        if self.split is not None:
            rows = blocks(self.split, view[-2])
            work = Split(work=work, sizes=rows, factors=tuple(self.adjust(n, view[-1]) for n in rows))
        return work, wire_of(self.wire), "full" if self.mode == "periodic" else self.mode

    def update(self, p: Tensor, g: Tensor, s: Any, h: Hyper) -> Asking:
        o = yield from self.orthogonal(g, s, h)
        if self.adjust_lr == "rms_rescale":
            o = o * (yield from self.rescaling(s, h, squares(o)))
        return o, *self.rates(h)

    def lines(self) -> tuple[Callable[..., Asking], ...]:
        """What `update` asks of the rows of what o becomes, in order: generators from the `squares` of all that it has
        been so far to a factor, or a divisor, of every local row, float32, (..., rows or 1, 1). Kernels add up the
        squares, and these make of them what the reference makes of them."""
        return (self.rescaling,) if self.adjust_lr == "rms_rescale" else ()

    def rescaling(self, s: Any, h: Hyper, rows: Tensor) -> Asking:
        """What gives every matrix of a stack, every block of `split`, an RMS of 0.2; 0 stays 0. Asks a norm."""
        if self.split is not None:
            mean = yield Mean(rows, dim=(-2, -1), blocks=blocks(self.split, h.shape[-2]))
            return (0.2 / mean.sqrt().clamp(min=1e-12)).unsqueeze(-1)
        norm = (yield Sum(rows, dim=(-2, -1))).sqrt().clamp(min=1e-8)
        return (0.2 * sqrt(h.shape[-2] * h.shape[-1]) / norm).float()[..., None, None]

    def orthogonal(self, g: Tensor, s: Any, h: Hyper) -> Asking:
        """Momentum, then the polar factor of what the step is made of."""
        fresh = 1 - h.momentum if self.accumulate == "ema" else 1.0
        m = yield from s.momentum_buffer.recur(h.momentum, g * fresh)
        return (yield self.asked(self.prepared(m * h.momentum + g * fresh if self.nesterov else m), h))

    def prepared(self, x: Tensor) -> Tensor:
        """What of x is orthogonalized."""
        return x

    def asked(self, x: Tensor, h: Hyper) -> Whole:
        work, wire, mode = self.whole(h.shape)
        return Whole(x, work, wire, "local" if self.mode == "periodic" and h.phase % self.period else mode)

    def rates(self, h: Hyper) -> tuple[Any, Any]:
        """The direction's step and the decay's."""
        rate = h.lr.double() if isinstance(h.lr, Tensor) else h.lr  # a product that is rounded once
        return rate * self.factor(h.shape), h.lr

    def factor(self, view: tuple[int, ...]) -> float:
        """Of the learning rate, for a parameter of this GLOBAL view; of a split one every block has its own."""
        return 1.0 if self.split is not None else self.adjust(*view[-2:])

    def adjust(self, rows: int, cols: int) -> float:
        """The factor of the learning rate of a matrix of this GLOBAL shape."""
        if not rows * cols:
            return 1.0  # nothing to adjust, and no ratio
        if self.adjust_lr == "original":
            return sqrt(max(1.0, rows / cols))
        if self.adjust_lr == "match_rms_adamw":
            return 0.2 * sqrt(max(rows, cols))
        return sqrt(rows / cols) if self.adjust_lr == "spectral" else 1.0

    def details(self, views: Collection[tuple[int, ...]]) -> dict[str, str]:
        found = {"orthogonalizer": orthogonalizer(self.orthogonalizer).words()}
        if self.split is not None:
            cuts = [f"{view[-2]}x{view[-1]} into {cut_into(blocks(self.split, view[-2]))}" for view in views]
            more = [f"{len(cuts) - SHOWN} more shapes"] if len(cuts) > SHOWN else []
            found["split"] = "; ".join([*cuts[:SHOWN], *more])
        there, back = wire_of(self.wire)
        ways = f"{there} there and back" if there == back else f"{there} there, {back} back"
        found["wire"] = f"{self.wire}: {ways}"
        if self.mode != "full":
            found["mode"] = f"{self.mode}, period {self.period}" if self.mode == "periodic" else self.mode
        if self.mode == "local":
            del found["wire"]  # nothing travels
        return found

    def caveat(self) -> str | None:
        if self.mode in ("gram", "auto"):
            return f"mode={self.mode!r}: where the Gram form runs nothing is encoded, compare meshes with wire='exact'"
        if self.mode in ("local", "periodic"):
            return f"mode={self.mode!r} orthogonalizes shards: another algorithm, whose result DEPENDS ON THE MESH"
        return None

    def stepped(self, group: dict[str, Any]) -> None:
        if self.mode == "periodic":
            group["phase"] = (group["phase"] + 1) % self.period


def translated(options: Mapping[str, Any], like: Orthogonalizer) -> dict[str, Any]:
    """The switches that options of torch.optim.Muon say. like: the Newton-Schulz whose other options they leave."""
    found: dict[str, Any] = {}
    if "adjust_lr_fn" in options:
        found["adjust_lr"] = options["adjust_lr_fn"] or "original"
    changed = {new: options[old] for old, new in TORCHS.items() if old in options}
    if "coefficients" in changed:
        changed["coefficients"] = known_as(changed["coefficients"])
    if changed:
        base = like if isinstance(like, NewtonSchulz) else NewtonSchulz()
        found["orthogonalizer"] = replace(base, **changed).describe()
    return found


def known_as(triple: Any) -> Any:
    """torch.optim.Muon's ns_coefficients as `coefficients` of shardopt.polar: by name where they have one."""
    if isinstance(triple, str):
        return triple
    return "quintic" if (tuple(triple),) == SETS["quintic"].triples else tuple(triple)


def squares(x: Tensor) -> Tensor:
    """x's squares, added up along every local row: (..., rows, 1) float64."""
    return (x * x).sum(dim=-1, keepdim=True, dtype=torch.float64)


def blocks(split: Any, rows: int) -> tuple[int, ...]:
    """Rows of every block: all in one, equal ones, or as given."""
    if split is None:
        return (rows,)
    return tuple(split) if isinstance(split, (tuple, list)) else (split,) * (rows // split)


def cut_into(rows: tuple[int, ...]) -> str:
    """Blocks of rows in words: heads are equal, fused q, k, v need not be."""
    if len(set(rows)) == 1:
        return f"{counted(len(rows), 'block')} of {rows[0]} rows"
    return f"blocks of {', '.join(map(str, rows[:8]))}{', ...' if len(rows) > 8 else ''} rows"


def wire_of(spec: str) -> Wire:
    """The formats of a wire's name, or of "there+back"."""
    formats = spec.split("+") if isinstance(spec, str) else ()
    if len(formats) != 2 and spec not in WIRES:
        names = f"{', '.join(WIRES)}, or two codecs as 'there+back'"
        raise ValueError(f"wire is {spec!r}; give one of {names}{near(spec, WIRES)}")
    return WIRES.get(spec) or Wire(*formats)
