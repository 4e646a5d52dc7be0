"""What an optimizer holds and does, in numbers: bytes of state, and the recipe of every group."""

from dataclasses import dataclass, field
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from shardopt.dtensor import lazy
from shardopt.dtensor.cost import GIVEN
from shardopt.dtensor.layout import local_of
from shardopt.kernels import NoTwin, key_for
from shardopt.kernels.cache import NoCompiler
from shardopt.spelling import counted, first_of
from shardopt.state import KEY, STEP

WIDTH = 14  # of the column of titles


@dataclass
class StateBytes:
    """Bytes of optimizer state. parts: name -> (global bytes, bytes on this rank), step counts and keys left out.

    parameters: GLOBAL number of elements that have state; per_parameter: global bytes an element.
    """

    parameters: int = 0
    total: int = 0
    local: int = 0
    parts: dict[str, tuple[int, int]] = field(default_factory=dict)

    @property
    def per_parameter(self) -> float:
        return self.total / self.parameters if self.parameters else 0.0

    def __str__(self) -> str:
        lines = [f"{'':32} {'all ranks':>16} {'this rank':>16}"]
        lines += [f"{name:32} {both[0]:>16,} {both[1]:>16,} bytes" for name, both in self.parts.items()]
        lines.append(f"{'state':32} {self.total:>16,} {self.local:>16,} bytes, {self.per_parameter:.4f} a parameter")
        return "\n".join(lines)


def state_bytes(opt: Any) -> StateBytes:
    """Bytes of the state of all parameters, by part: global, and on this rank (contiguous shards); also of torch's."""
    if hasattr(opt, "settle"):
        opt.settle()
    found = StateBytes(parameters=sum(p.numel() for p, state in opt.state.items() if state))
    for name, part in chain.from_iterable(state.items() for state in opt.state.values()):
        if name in (STEP, KEY) or not isinstance(part, Tensor):
            continue
        whole, here = part.numel() * part.element_size(), local_of(part).numel() * part.element_size()
        before = found.parts.get(name, (0, 0))
        found.parts[name] = (before[0] + whole, before[1] + here)
        found.total += whole
        found.local += here
    return found


def explain(opt: Any) -> str:
    """Per group: recipe, what runs it and why, the codecs of its parameters; how whole matrices are planned; and the
    communication counted so far. Says what it assumes where there is no gradient yet; no rank waits for another."""
    lines = []
    for i, (recipe, group) in enumerate(zip(opt.recipes, opt.param_groups)):
        params = group["params"]
        lines.append(f"group {i}: {recipe.key()}")
        rows = {
            **({"role": str(group["role"])} if "role" in group else {}),
            "parameters": f"{len(params):,} of {sum(p.numel() for p in params):,} elements{named(group)}",
            "numbers": numbers(opt, i),
            **recipe.rule.details(list(dict.fromkeys(opt.plan(recipe, p).layout.geo.view for p in params))),
        }
        lines += [f"  {title:{WIDTH}} {words}" for title, words in rows.items()]
        lines += [f"  {f'{count:,} with':{WIDTH}} {words}" for words, count in formats(opt, recipe, params).items()]
        if caveat := recipe.rule.caveat():
            lines.append(f"  {caveat}")
    answers = opt.answers
    lines += matrices(opt)
    lines.append(
        f"so far: {progress(opt)}; {counted(answers.rounds, 'round')} of communication with "
        f"{counted(answers.collectives, 'collective')}, {answers.bytes:,} bytes a rank"
    )
    return "\n".join(lines)


def named(group: Any) -> str:
    """The first names of a group's parameters, where it has them."""
    names = group.get("param_names", ())
    return f": {first_of(names, 3)}" if names else ""


def numbers(opt: Any, i: int) -> str:
    """What a step reads from a param group, the rate and the decay first; reads tensors on their devices."""
    group, recipe = opt.param_groups[i], opt.recipes[i]
    names = dict.fromkeys(("lr", "weight_decay", *recipe.defaults()))
    found = [f"{name} {shown(group[name])}" for name in names if name in group and name in recipe.defaults()]
    alike = [j for j, other in enumerate(opt.param_groups) if other.get("lr") is group["lr"] and j != i]
    if alike and isinstance(group["lr"], Tensor):
        found[0] += f" (one tensor with group {', '.join(map(str, alike))})"
    return ", ".join([*found, *["maximize"] * bool(group.get("maximize"))])


def shown(value: Any) -> str:
    """A number of a group, a tensor's too, or several."""
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shown, value))})"
    if isinstance(value, Tensor):
        return "on meta" if value.device.type == "meta" else f"{value.item():g}"
    return f"{value:g}" if isinstance(value, (int, float)) else str(value)


def progress(opt: Any) -> str:
    """How many steps were taken, as the states have it: also those of the run that this one goes on from."""
    counts: list[float] = []
    for _, here in groupby(sorted(steps_of(opt), key=device_of), key=device_of):
        counts += torch.stack(list(here)).tolist()  # one wait a device
    if not (opt.calls and counts):
        return counted(opt.calls, "step")
    most, fewest = int(max(counts)), int(min(counts))
    since = None if opt.resumed_at is None else opt.calls - opt.resumed_at
    words = f"resumed at step {most:,}, no step taken since" if since == 0 else counted(most, "step")
    words += f", {counted(since, 'call')} of step() since the state was loaded" if since else ""
    words += f", some parameters fewer, from {fewest:,}" if fewest < most else ""
    return words + (f", {opt.skipped_steps:,} skipped" if opt.skipped_steps else "")


def steps_of(opt: Any) -> list[Tensor]:
    """The step counts, 0-d float32, of all parameters that have state; none is made."""
    return [state[STEP] for state in dict.values(opt.state) if STEP in state]


def device_of(count: Tensor) -> str:
    return str(count.device)


def matrices(opt: Any) -> list[str]:
    """How whole matrices are planned, by mesh: a summary, then shapes, their modes and why. Before the first step that
    asks for some: how they will be if every parameter that requires a gradient gets one."""
    title = "whole matrices:"
    plans = list({id(task.plan): task.plan for task in opt.answers.scheduled.tasks.values()}.values())
    if not plans:
        title = "whole matrices, if every parameter that requires a gradient gets one:"
        plans = opt.answers.foreseen(wanted(opt))
    lines = []
    for plan in plans:
        lines += [title, *(f"  {line}" for line in plan.summary().splitlines())]
        if plan.sharing or any(plan.why):
            lines.append(f"  times are predicted for {GIVEN.words()}")
        kinds = [(member.shape, mode, why) for member, mode, why in zip(plan.members, plan.modes, plan.why)]
        for shape, mode, why in dict.fromkeys(kinds):
            count = counted(kinds.count((shape, mode, why)), "parameter")
            lines.append(f"  {count} of {shape}: {mode}{f' ({why})' if why else ''}")
    return lines


def wanted(opt: Any) -> list[tuple[Any, Any]]:
    """(layout, what is wanted) of all that will ask for whole matrices."""
    found = []
    for recipe, _, p in opt.parameters():
        layout = opt.plan(recipe, p).layout
        if p.requires_grad and (want := recipe.rule.whole(layout.geo.view)) is not None:
            found.append((layout, want))
    return found


def formats(opt: Any, recipe: Any, params: list[Tensor]) -> dict[str, int]:
    """How many parameters got which codecs by their GLOBAL shapes, and what steps them."""
    counts: dict[str, int] = {}
    for p in params:
        _, layout, codecs = opt.plan(recipe, p)
        words = ", ".join(f"{slot}: {codec.describe()}" for slot, codec in codecs.items()) or "no state"
        words = f"{words}; runs on {backend(opt, recipe, codecs, layout, p)}"
        counts[words] = counts.get(words, 0) + 1
    return counts


def backend(opt: Any, recipe: Any, codecs: Any, layout: Any, p: Tensor) -> str:
    """What steps a parameter and, where that is the reference, why; compiles nothing."""
    if opt.native is None:
        return "the reference (fused=False)"
    device, dtype = lazy.local_device(p), p.grad_dtype or p.dtype if p.grad is None else p.grad.dtype
    if device.type == "meta":
        return "what its device has (it is on meta)"
    if not local_of(p).is_contiguous():
        return "the reference (a parameter is not contiguous)"
    try:
        key_for(recipe, codecs, layout, device, (p.dtype, dtype))
        assumed = f" if its gradient is {str(dtype).removeprefix('torch.')}" if p.grad is None else ""
        return f"a kernel by {opt.native.compiler(device)}{assumed}"
    except (NoTwin, NoCompiler) as why:
        return f"the reference ({why})"
