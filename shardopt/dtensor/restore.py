"""What of a checkpoint goes where: read in place, transcoded or started fresh; all decided before any is written."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from shardopt.codecs import Codec, view_shape
from shardopt.dtensor import lazy, transcode
from shardopt.dtensor.channel import Channel
from shardopt.dtensor.layout import Layout, local_of
from shardopt.dtensor.match import check_meaning, sentence
from shardopt.dtensor.record import optimizer_state
from shardopt.dtensor.saved_groups import SavedGroups
from shardopt.dtensor.stored import Stored, put
from shardopt.dtensor.transcode import Job
from shardopt.recipe import Recipe
from shardopt.spelling import first_of
from shardopt.state import KEY, STEP, part_name, part_specs
from shardopt.telling import tell

TOLD = 12  # names of what is in a checkpoint and not here, or of another dtype


@dataclass
class Plan:
    """What a load will do. reads: entry -> tensor to be read into. steps: entry of a plain number -> step count.

    fresh: (state, slots, layout, device) to start anew. counts: step counts and what they are set to. made: frozen
    parameters whose state was made for this load. In words: missing, what the checkpoint does not have; surplus, what
    it alone has; cast, model entries of another dtype; others, options that are not the saved ones.
    """

    reads: dict[str, Any] = field(default_factory=dict)
    steps: dict[str, Tensor] = field(default_factory=dict)
    jobs: list[Job] = field(default_factory=list)
    fresh: list[tuple[dict[str, Tensor], dict[str, Codec], Layout, torch.device]] = field(default_factory=list)
    counts: list[tuple[Tensor, int]] = field(default_factory=list)
    made: list[Tensor] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    surplus: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    cast: list[str] = field(default_factory=list)


def plan_model(plan: Plan, stored: Stored, model_state: Mapping[str, Any], key: str) -> None:
    """Every entry of the model's state dict that the checkpoint has; ValueError for another shape or none at all."""
    prefix = f"{key}." if key else ""
    found = {name: value for name, value in model_state.items() if prefix + name in stored.entries}
    if model_state and not found:
        raise ValueError(
            f"{stored.folder} has none of the model's parameters under {key!r}; its top-level names are "
            f"{', '.join(stored.top_level())}. Give the right one as model_key"
        )
    if prefix:
        theirs = (name[len(prefix) :] for name in stored.entries if name.startswith(prefix))
        inside = tuple(f"{name}." for name, value in model_state.items() if not isinstance(value, Tensor))
        plan.surplus += [name for name in theirs if name not in model_state and not name.startswith(inside)]
    for name, value in model_state.items():
        if name not in found:
            plan.missing.append(f"{name} (the model's)")
            continue
        have = stored.tensor(prefix + name)
        if isinstance(value, Tensor) and have is not None:
            if have[0] != tuple(value.shape):
                raise ValueError(
                    f"{name} has shape {have[0]} in {stored.folder}, {tuple(value.shape)} in this model; build the "
                    "model that was saved"
                )
            if have[1] != value.dtype:
                plan.cast.append(f"{name} ({have[1]} to {value.dtype})")
        plan.reads[prefix + name] = value if isinstance(value, Tensor) else None


@dataclass
class OptimizerPlanner:
    """Adds to a plan what an optimizer's parameters need. key: the optimizer's name in the checkpoint."""

    plan: Plan
    stored: Stored
    opt: Any
    groups: SavedGroups
    key: str

    def add(self, names: Sequence[Sequence[str]]) -> None:
        """All parameters; names: per group. ValueError for a rule, slot or shape that does not match."""
        known = {name for group in names for name in group}
        self.have = self.suffixes(known)
        if not any(self.have.values()) and any(names) and known.isdisjoint(self.groups.names):
            raise ValueError(
                f"{self.stored.folder} has no state of this optimizer's parameters under {self.key!r}; its top-level "
                f"names are {', '.join(self.stored.top_level())}. Give the right one as optim_key"
            )
        others = set(self.have) - known - set(self.plan.surplus)
        self.plan.surplus += [f"{name} (its optimizer state)" for name in sorted(others) if self.have[name]]
        recipes = getattr(self.opt, "recipes", [None] * len(names))
        if hasattr(self.opt, "make_states"):
            pairs = [both for i, g in enumerate(self.opt.param_groups) for both in zip(names[i], g["params"])]
            self.plan.made += [p for name, p in pairs if self.have[name] and p not in self.opt.state]
            self.opt.make_states(frozen=set(self.plan.made))
        for recipe, group, group_names in zip(recipes, self.opt.param_groups, names):
            for name, p in zip(group_names, group["params"]):
                if p not in self.opt.state:
                    continue  # a frozen parameter has none, here and there
                if recipe is None:
                    self.parameter_of_torch(name, self.opt.state[p])
                else:
                    self.parameter(name, p, recipe)
        for number, (recipe, group_names) in enumerate(zip(recipes, names)):
            if recipe is not None:
                self.plan.others += self.groups.differences(number, recipe, group_names)

    def parameter_of_torch(self, name: str, state: Mapping[str, Any]) -> None:
        """Of an optimizer without recipes: every tensor of its state by its name."""
        if not self.have[name]:
            self.plan.missing.append(f"{name} (its optimizer state)")
            return
        for slot, value in state.items():
            entry = f"{self.key}.state.{name}.{slot}"
            found = self.stored.tensor(entry)
            if not isinstance(value, Tensor) or found is None or found[0] != tuple(value.shape):
                raise ValueError(
                    f"{name}: {slot} is not in {self.stored.folder} as {type(self.opt).__name__} needs it, which "
                    f"holds {', '.join(sorted(self.have[name]))}. torch.optim loads fp32 state of the same rule only"
                )
            self.plan.reads[entry] = value

    def suffixes(self, known: set[str]) -> dict[str, set[str]]:
        """Parameter -> names of its state's entries; the longest name that fits owns an entry."""
        found: dict[str, set[str]] = {name: set() for name in known}
        prefix = f"{self.key}.state."
        manifest = self.stored.manifest or {}
        every = known | set(manifest.get("parameters", ())) | set(self.groups.names)
        for entry in self.stored.entries:
            words = entry[len(prefix) :].split(".") if entry.startswith(prefix) else []
            for end in range(len(words) - 1, 0, -1):
                owner = ".".join(words[:end])
                if owner in every:
                    found.setdefault(owner, set()).add(".".join(words[end:]))
                    break
        return found

    def parameter(self, name: str, p: Tensor, recipe: Recipe) -> None:
        have, prefix = self.have[name], f"{self.key}.state.{name}."
        told = (self.stored.manifest or {}).get("parameters", {}).get(name)
        view, shape, state = view_shape(tuple(p.shape)), tuple(p.shape), dict(self.opt.state[p])
        layout, device = self.opt.plan(recipe, p).layout, lazy.local_device(p)
        codecs = recipe.codecs(view, p.dtype)
        if not have:
            if codecs or self.groups.recipe_of(name) is not None:  # torch's SGD without momentum has no state
                self.plan.missing.append(f"{name} (its optimizer state)")
            self.plan.fresh.append((state, codecs, layout, device))
            self.plan.counts.append((state[STEP], 0))
            return
        self.check_rule(name, recipe, have, set(codecs))
        signed = {slot.name: slot.signed for slot in (*recipe.slots(), *recipe.write.slots(p.dtype))}
        for slot, new in codecs.items():
            told_codec = told["slots"].get(slot) if told else None
            old = self.stored.codec_of(prefix, slot, signed[slot], shape, view, told_codec)
            if old is None and slot in {s.name for s in recipe.rule.slots()}:
                raise ValueError(
                    f"{name}: slot {slot} of shape {shape} is not in {self.stored.folder}, which holds "
                    f"{', '.join(sorted(have))} for it (recipe here: {recipe.key()}). Load it with the optimizer that "
                    "saved it"
                )
            if old is None:
                self.plan.fresh.append((state, {slot: new}, layout, device))
            elif type(old) is type(new) and old.parts(view) == new.parts(view):
                for part in new.parts(view):
                    self.plan.reads[prefix + part_name(slot, part.suffix)] = state[part_name(slot, part.suffix)]
            else:
                self.plan.jobs.append(Job(prefix, slot, old, new, layout, layout, state, device))
        self.counters(prefix, state)

    def counters(self, prefix: str, state: Mapping[str, Tensor]) -> None:
        """step, and the key of the noise where this recipe draws some and the saved one did too."""
        if self.stored.tensor(prefix + STEP) is not None:
            self.plan.reads[prefix + STEP] = state[STEP]
        elif prefix + STEP in self.stored.entries:
            self.plan.steps[prefix + STEP] = state[STEP]
        else:  # torch's SGD and friends count no steps
            self.plan.counts.append((state[STEP], 1))
        if KEY in state and self.stored.tensor(prefix + KEY) is not None:
            self.plan.reads[prefix + KEY] = state[KEY]

    def check_rule(self, name: str, recipe: Recipe, have: set[str], slots: set[str]) -> None:
        """ValueError where the checkpoint's state is another rule's: by its recipe, else by its slots."""
        theirs = self.groups.recipe_of(name)
        check_meaning(f"{self.stored.folder}: {name}", recipe, self.groups.by_name.get(name, {}), theirs)
        if theirs is not None:
            return
        strange = sorted(s for s in have - {STEP, KEY} if not any(s == x or s.startswith(x + ".") for x in slots))
        if strange:
            raise ValueError(
                f"{name} has {', '.join(strange)} in {self.stored.folder}, which recipe {recipe.key()} (slots "
                f"{', '.join(sorted(slots)) or 'none'}) does not know: it was saved by another optimizer. Build the "
                "one that saved it"
            )


def carry_out(plan: Plan, stored: Stored, ranks: Channel, answers: Any) -> dict[str, Any]:
    """Write everything that was planned; returns the entries read that are no tensors, by name."""
    values = stored.read({**plan.reads, **dict.fromkeys(plan.steps)}, ranks)
    for name, target in plan.steps.items():
        target.fill_(values[name])
    for target, count in plan.counts:
        target.fill_(count)
    for state, codecs, layout, device in plan.fresh:
        for name, part in part_specs(codecs, layout).items():
            put(state[name], local_of(layout.new(part, device)))
    transcode.run(plan.jobs, stored, ranks, answers)
    return values


def restore(stored: Stored, model: torch.nn.Module, opt: Any, ranks: Channel, keys: tuple[str, str]) -> int:
    """Load model and optimizer in place, under these keys; returns the largest step count that was loaded."""
    plan, model_state = Plan(), get_model_state_dict(model)
    names, _ = optimizer_state(model, opt)
    groups = SavedGroups(stored, ranks, keys[1], [name for group in names for name in group])
    plan_model(plan, stored, model_state, keys[0])
    planner = OptimizerPlanner(plan, stored, opt, groups, keys[1])
    try:
        planner.add(names)
    except ValueError:
        for p in plan.made:
            dict.pop(opt.state, p, None)
        raise
    if ranks.rank == 0:
        report(plan, stored.folder)
    values = carry_out(plan, stored, ranks, getattr(opt, "answers", None))
    prefix = f"{keys[0]}." if keys[0] else ""
    set_model_state_dict(model, {name: values.get(prefix + name, value) for name, value in model_state.items()})
    recipes = getattr(opt, "recipes", [None] * len(names))
    for group, group_names, recipe in zip(opt.param_groups, names, recipes):
        groups.restore(group, group_names, recipe)
    if hasattr(opt, "resumed"):
        opt.resumed(p for group in opt.param_groups for p in group["params"])
    return max((int(state[STEP]) for state in opt.state.values() if STEP in state), default=0)


def report(plan: Plan, folder: Path) -> None:
    told = [f"lacks {', '.join(plan.missing)}: left as they are, or started fresh"] if plan.missing else []
    if plan.surplus:
        told.append(f"holds {first_of(plan.surplus, TOLD)}, which this model or optimizer has not: ignored")
    if told:
        tell(f"{folder} {'; it '.join(told)}")
    if plan.others:
        tell(f"{folder}: {sentence(plan.others)}")
    if plan.cast:
        tell(f"{folder} has other dtypes, which were converted: {first_of(plan.cast, TOLD)}")
