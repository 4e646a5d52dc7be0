"""In front of all rules: totals that add-ons ask for, and whether the step is taken at all, in one reduction."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardopt.asks import EVERYWHERE, Sum, Total
from shardopt.item import LARGEST, Item, Policy


class Share(NamedTuple):
    """What is summed over some items before the rules: those of one mesh and one set of sharding axes."""

    layout: Any  # of one of them
    name: str  # of the add-on
    members: list[int]
    addons: list[Any]  # of every member


def before(
    items: Sequence[Item], answers: Any, policy: Policy, native: Any = None
) -> tuple[dict[str, Tensor], Tensor | None]:
    """The one reduction in front of all rules: (totals by add-on name, whether the step is taken or None).

    A total is the sum over the parameters whose recipe has the add-on.
    """
    shares = shares_of(items)
    meshes = joining([item.layout for item in items]) if policy.nonfinite == "skip" else []
    if not shares and not meshes:
        return {}, wanted(policy)
    found = native.survey(items, shares, meshes, policy) if native is not None else None
    sums, count = found or surveyed(items, shares, policy)
    return agreed(shares, meshes, sums, count, answers, policy)


def shares_of(items: Sequence[Item]) -> list[Share]:
    """By add-on, mesh and sharding axes as they first appear, so that a message is as long as there are places."""
    found: dict[Any, Share] = {}
    for i, item in enumerate(items):
        for addon in item.recipe.addons:
            if addon.before_round:
                place = addon.name, id(item.layout.mesh), item.layout.sharding
                share = found.setdefault(place, Share(item.layout, addon.name, [], []))
                share.members.append(i)
                share.addons.append(addon)
    return list(found.values())


def surveyed(items: Sequence[Item], shares: Sequence[Share], policy: Policy) -> tuple[list[Tensor], Tensor]:
    """(this rank's part of every share, how many of its gradients' elements are wild)."""
    sums = []
    for share in shares:
        parts = [addon.before(prepared(items[i], policy)).x for i, addon in zip(share.members, share.addons)]
        sums.append(torch.stack([part.to(parts[0].device) for part in parts]).sum())
    looked = items if policy.nonfinite == "skip" else ()
    counts = [(~tame(unscaled(item, policy))).sum().double().to(items[0].grad.device) for item in looked]
    return sums, sum(counts, start=torch.zeros((), dtype=torch.float64))


def agreed(
    shares: Sequence[Share], meshes: Sequence[Any], sums: Sequence[Tensor], count: Any, answers: Any, policy: Policy
) -> tuple[dict[str, Tensor], Tensor | None]:
    """What `before` returns, from what this rank found; all ranks ask the same, whoever counted."""
    asks: list[tuple[Any, Any]] = [(share.layout, Total(x)) for share, x in zip(shares, sums)]
    flags = [(layout, Sum(count, over=EVERYWHERE)) for layout in meshes]
    results = answers.start(asks + flags[:1]).finish() if asks or flags else []
    totals: dict[str, Tensor] = {}
    for share, value in zip(shares, results):
        totals[share.name] = totals[share.name] + value.to(totals[share.name].device) if share.name in totals else value
    taken = wanted(policy)
    if flags:
        bad = results[-1]
        for layout, ask in flags[1:]:  # meshes of other ranks: each hears what the one before found
            (bad,) = answers.start([(layout, ask._replace(x=bad.to(ask.x.device)))]).finish()
        taken = bad == 0 if taken is None else taken.to(bad.device) & (bad == 0)
    return totals, taken


def wanted(policy: Policy) -> Tensor | None:
    """Whether GradScaler wants the step, None where there is none."""
    return None if policy.found_inf is None else policy.found_inf.reshape(()) == 0


def skipped(so_far: Tensor | None, taken: Tensor | None) -> Tensor | None:
    """How many steps were not taken, this one included; None as long as every step is."""
    if taken is None:
        return so_far
    missed = (~taken).to(torch.int64)
    return missed if so_far is None else so_far.to(missed.device) + missed


def joining(layouts: Sequence[Any]) -> list[Any]:
    """Layouts whose meshes join all ranks, on every axis of which a flag is asked.

    The largest mesh comes first; others only where they reach ranks that it does not.
    """
    meshes: dict[int, Any] = {}  # one layout of each: to compare ranks is slow
    for layout in layouts:
        meshes.setdefault(id(layout.mesh), layout)
    chosen: list[Any] = []
    for layout in sorted(meshes.values(), key=lambda layout: -layout.mesh_ranks.numel()):
        ranks = set(layout.mesh_ranks.tolist())
        if not any(ranks <= set(c.mesh_ranks.tolist()) for c in chosen):
            chosen.append(layout)
    return chosen


def tame(g: Tensor) -> Tensor:
    """Where an element and its square are finite."""
    return g.abs() < LARGEST


def unscaled(item: Item, policy: Policy) -> Tensor:
    """The gradient without GradScaler's scale, fp32, local view."""
    g = item.layout.view(item.grad).float()
    return g if policy.grad_scale is None else g / policy.grad_scale.to(g.device)


def prepared(item: Item, policy: Policy) -> Tensor:
    """The gradient as the rule sees it: fp32, local view, unscaled, tame where asked, its sign turned to maximize."""
    g = unscaled(item, policy)
    if policy.nonfinite == "zero":
        g = torch.where(tame(g), g, 0.0)
    return -g if item.group.get("maximize") else g
