"""What a kernel is made for: a recipe with the formats and dtypes of one parameter, as the text of a C++ type."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from shardopt.addons import Addon, GradientCentralization
from shardopt.asks import Slot
from shardopt.codecs import CODECS, Codec
from shardopt.codecs.rows import Rows
from shardopt.kernels.twins import (
    ADDONS,
    BEFORE,
    FACTORED,
    MEMORY,
    RULES,
    WHOLE,
    Extremes,
    NoTwin,
    Round,
    Twin,
    codec_twin,
    sums_rows,
    tables_source,
)
from shardopt.recipe import Recipe

Codecs = tuple[tuple[str, Codec], ...]


@dataclass(frozen=True)
class Key:
    """cpp: the C++ type `Step<...>`. words: for people. twins: whose numbers are passed, in order.

    blocks: of the codecs that have some; noisy: whether noise is drawn, so that rows and columns matter. rounds: what
    is asked, round by round, in the reference's order; stored: whether the step uses what will be read back. across: of
    the slots with blocks on several ranks, asked in the last round.
    """

    cpp: str
    words: str
    twins: tuple[Twin, ...]
    blocks: tuple[int, ...]
    noisy: bool
    rounds: tuple[Round, ...] = ()
    stored: bool = False
    across: tuple[Extremes, ...] = ()

    @property
    def passes(self) -> bool:
        """Whether a tile is walked more than once."""
        return bool(self.rounds) or self.stored

    @property
    def factored(self) -> bool:
        """Whether rows and columns of every matrix are summed."""
        return FACTORED in self.rounds

    @property
    def sums_rows(self) -> bool:
        """Whether rows of the view are summed."""
        return any(sums_rows(asked) for asked in self.rounds)

    @property
    def placed(self) -> bool:
        """Whether it matters in which row and column an element lies."""
        return self.noisy or bool(self.blocks) or self.sums_rows

    @property
    def tile(self) -> int:
        """Elements of a row that one team steps at a time."""
        return max((256, *self.blocks))

    def numbers(self, group: Mapping[str, Any], totals: Mapping[str, Any]) -> list[Any]:
        return [x for twin in self.twins for x in twin.numbers(group, totals)]

    def source(self, backend: str) -> str:
        """The translation unit: `backend` is cpu, cuda or emulated."""
        macro = f"SHARDOPT_{backend.upper()}"
        kernels = [f"{macro}(shardopt::Key)\n"]
        if backend != "cpu":
            kernels = [f"{macro}({name}, shardopt::{of})\n" for name, of in self.kernels.items()]
        head = f'#include "{backend}.h"\nnamespace shardopt {{\n{tables_source(self.cpp)}using Key = {self.cpp};\n}}\n'
        return head + "".join(kernels)

    @property
    def kernels(self) -> dict[str, str]:
        """A GPU's kernels, by name, and the structs of csrc that they run."""
        if not self.rounds:
            return {"step": "Stepping<shardopt::Key>"}
        passes = {f"pass{i}": f"Pass<shardopt::Key, {i}>" for i in range(len(self.rounds) + 1)}
        settles = {"settle": "Settling<shardopt::Key>"} if self.factored else {}
        closes = {"close": "Closing<shardopt::Key>"} if self.across else {}
        return {**passes, "gather": "Gathering", **settles, **closes}


@lru_cache(maxsize=4096)
def key_of(
    recipe: Recipe,
    codecs: Codecs,
    parameter: torch.dtype,
    gradient: torch.dtype,
    before: tuple[str, ...] = (),
    matrix: bool = True,
    across: tuple[str, ...] = (),
) -> Key:
    """The key of a step. before: "unscale", "zero", "maximize", what is done to the gradient first. matrix: whether the
    view has rows and columns. across: the slots of which blocks lie on several ranks. Raises NoTwin."""
    check_recipe(recipe)
    for what, dtype in (("parameters", parameter), ("gradients", gradient)):
        if dtype not in MEMORY:
            raise NoTwin(f"{what} of {dtype} have no native twin")
    rule = RULES[type(recipe.rule)](recipe.rule, parameter)
    held = [(slot, codec) for slot, codec in codecs if not isinstance(codec, Rows)]
    slots = [codec_twin(codec, slot, slot in across) for slot, codec in held]
    acting = [addon for addon in recipe.addons if matrix or type(addon) is not GradientCentralization]
    stages = {
        stage: [ADDONS[type(addon)](addon, slot_of(recipe, addon)) for addon in acting if addon.stage == stage]
        for stage in ("gradient", "direction", "decay")
    }
    stages["gradient"] = [BEFORE[word] for word in before] + stages["gradient"]
    chains = ["Chain<" + ", ".join(twin.cpp for twin in stages[stage]) + ">" for stage in stages]
    write = {"nearest": "Nearest", "stochastic": "Stochastic"}.get(recipe.rounding) or kahan(recipe, parameter)
    memory = f"{MEMORY[parameter]}, {MEMORY[gradient]}"
    stored = ", true" if recipe.update_from == "stored" else ""
    if across and stored:
        raise NoTwin('update_from="stored" asks for one slot after another where blocks lie on several ranks')
    cpp = f"Step<{memory}, {rule.cpp}, Slots<{', '.join(slots)}>, {', '.join(chains)}, {write}{stored}>"
    asked = [asked for twin in stages["gradient"] for asked in twin.rounds]
    whole = rule.rounds.count(WHOLE)
    asked += [*rule.rounds[:whole], *[FACTORED] * ("Factored" in slots), *rule.rounds[whole:]]
    asked += [asked for twin in stages["direction"] for asked in twin.rounds]
    extremes = tuple(
        Extremes(slot, i, getattr(codec, "block", 1), isinstance(codec, CODECS["log8"]))
        for i, (slot, codec) in enumerate(held)
        if slot in across
    )
    if extremes:
        asked.append(tuple(word for slot in extremes for word in slot.words))
    return Key(
        cpp,
        words_of(recipe, codecs, memory, before),
        (rule, *stages["gradient"], *stages["direction"], *stages["decay"]),
        tuple(codec.block for _, codec in codecs if hasattr(codec, "block")),
        recipe.write.noisy(parameter) or any(codec.noisy for _, codec in codecs),
        tuple(asked),
        bool(stored),
        extremes,
    )


def key_at(recipe: Recipe, view: tuple[int, ...], parameter: torch.dtype, gradient: torch.dtype) -> Key:
    """The key of a parameter of this GLOBAL view."""
    return key_of(recipe, tuple(recipe.codecs(view, parameter).items()), parameter, gradient, matrix=len(view) > 1)


def words_of(recipe: Recipe, codecs: Codecs, memory: str, before: tuple[str, ...]) -> str:
    """The recipe's key with the formats of this parameter: `adamw/sqrt8,root4/decay/nearest f32 <- bf16`."""
    rule, _, *rest = recipe.key().split("/")
    formats = ",".join(codec.describe() for _, codec in codecs) or "-"
    return " ".join(["/".join([rule, formats, *rest]), memory.lower().replace(", ", " <- "), *before])


def check_recipe(recipe: Recipe) -> None:
    """NoTwin where no parameter of this recipe can have a kernel, whatever its shape and dtype."""
    if type(recipe.rule) not in RULES:
        raise NoTwin(f"rule {recipe.rule.name} has no native twin")
    for addon in recipe.addons:
        if type(addon) not in ADDONS:
            raise NoTwin(f"add-on {addon.name} has no native twin")


def slot_of(recipe: Recipe, addon: Addon) -> int:
    """The number of an add-on's first slot."""
    before = recipe.addons[: recipe.addons.index(addon)]
    return elementwise(recipe.rule.slots()) + sum(elementwise(other.slots()) for other in before)


def kahan(recipe: Recipe, parameter: torch.dtype) -> str:
    """The slot of the compensation comes after those of rule and add-ons; fp32 has none."""
    return f"Kahan<{elementwise(recipe.slots())}>" if recipe.write.slots(parameter) else "Nearest"


def elementwise(slots: Iterable[Slot]) -> int:
    """How many slots a kernel has: those that have a number a row are none of its business, see `lines`."""
    return sum(not slot.rows for slot in slots)
