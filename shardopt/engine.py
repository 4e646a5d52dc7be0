"""Drives the rules: buckets in lock step, what they ask answered together, everything written once it is certain."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from shardopt.asks import EVERYWHERE, Asking, Sum, as_tuple, is_group
from shardopt.codecs.noise import PARAMETER_STREAM
from shardopt.item import Item, Policy, asks, pieces, viewed
from shardopt.recipe import Recipe
from shardopt.rules import Hyper
from shardopt.state import STEP, Slots, noise_of

BUCKET_ELEMENTS = 1 << 26  # local elements of one bucket, by global facts: bounds what is alive in lock step
ALIVE = 3  # buckets under way at once: one computes while the rounds of the others travel


def run(items: Sequence[Item], answers: Any, policy: Policy, native: Any = None) -> Tensor | None:
    """One step of all items. Returns None, or a 0-d bool: whether the step was taken (not skipped).

    What asks nothing is stepped one parameter after another, by `native` (shardopt.kernels) where that has a kernel;
    only the rest forms buckets, so that rounds are the same on every rank, whatever it can compile.
    """
    totals, taken = before(items, answers, policy)
    if taken is not None and taken.device.type == "cpu" and not taken:
        return taken
    alone: list[Item] = []
    asking: list[Item] = []
    for item in items:
        (asking if asks(item) else alone).append(item)
    for item in native.step(alone, asking, totals, policy, masked(taken)) if native is not None else alone:
        for asked in step_of(item, policy, totals, taken):
            raise AssertionError(f"{item.recipe.key()} asks {asked}, but says that it asks nothing")
    alive: list[Iterator[None]] = []
    for bucket in buckets(asking):
        steps = [speaking(i, step_of(item, policy, totals, taken)) for i, item in enumerate(bucket)]
        alive.append(drive(steps, [item.layout for item in bucket], answers))
        if len(alive) == ALIVE:
            alive = advance(alive)
    while alive:
        alive = advance(alive)
    return taken


def masked(taken: Tensor | None) -> Tensor | None:
    """The flag, where only the device knows it."""
    return taken if taken is not None and taken.device.type != "cpu" else None


def advance(alive: list[Iterator[None]]) -> list[Iterator[None]]:
    """One round of every bucket under way, in order; the first is then driven to its end, so that a place is free."""
    going = [bucket for bucket in alive if next(bucket, STOPPED) is None]
    if len(going) == ALIVE:
        for _ in going.pop(0):
            pass
    return going


STOPPED = object()


def drive(steps: Sequence[Asking], layouts: Sequence[Any], answers: Any) -> Iterator[None]:
    """Run the generators of one bucket to their ends in lock step; yields while a message of a round is on its way.

    A step speaks for one member of the bucket or for several: it yields {position: what that one asks} and is sent
    {position: reply}. A round is asked in the order of the positions, so that it is the same on every rank, whoever
    speaks for whom.
    """
    replies: dict[int, Any] = dict.fromkeys(range(len(steps)))
    while True:
        asked: dict[int, Any] = {}
        speaks: dict[int, int] = {}
        for k, reply in replies.items():
            try:
                mine = steps[k].send(reply)
            except StopIteration:
                continue
            asked.update(mine)
            speaks.update(dict.fromkeys(mine, k))
        replies.clear()
        if not asked:
            return
        order = sorted(asked)
        shape = [(i, is_group(asked[i]), len(as_tuple(asked[i]))) for i in order]
        under_way = answers.start([(layouts[i], ask) for i in order for ask in as_tuple(asked[i])])
        del asked, mine
        yield
        while under_way.advance():
            yield
        results = iter(under_way.finish())
        for i, grouped, count in shape:
            got = tuple(next(results) for _ in range(count))
            replies.setdefault(speaks[i], {})[i] = got if grouped else got[0]


def speaking(position: int, step: Asking) -> Asking:
    """The step of one member, as `drive` wants it."""
    reply: Any = None
    while True:
        try:
            asked = step.send(reply)
        except StopIteration:
            return
        reply = (yield {position: asked})[position]


def buckets(items: Iterable[Item]) -> Iterator[list[Item]]:
    """By mesh and sharding axes as they first appear, then cut in registration order by GLOBAL sizes."""
    places: dict[Any, list[Item]] = {}
    for item in items:
        places.setdefault((id(item.layout.mesh), item.layout.sharding), []).append(item)
    for here in places.values():
        bucket: list[Item] = []
        elements = 0
        for item in here:
            share = item.layout.numel // item.layout.ranks
            if bucket and elements + share > BUCKET_ELEMENTS:
                yield bucket
                bucket, elements = [], 0
            elements += share
            bucket.append(item)
        yield bucket


def before(items: Sequence[Item], answers: Any, policy: Policy) -> tuple[dict[str, Tensor], Tensor | None]:
    """The one reduction in front of all rules: (totals by add-on name, whether the step is taken or None).

    A total is the sum over the parameters whose recipe has the add-on.
    """
    asks: list[tuple[Any, Any]] = []
    names: list[str] = []
    for item in items:
        adding = [addon for addon in item.recipe.addons if addon.before_round]
        gradient = prepared(item, policy) if adding else None
        for addon in adding:
            asks.append((item.layout, addon.before(gradient)))
            names.append(addon.name)
    taken: Tensor | None = None if policy.found_inf is None else policy.found_inf.reshape(()) == 0
    flags = nonfinite_flags(items) if policy.nonfinite == "skip" else []
    results = answers.start(asks + flags[:1]).finish() if asks or flags else []
    totals: dict[str, Tensor] = {}
    for name, value in zip(names, results):
        totals[name] = totals[name] + value.to(totals[name].device) if name in totals else value
    if flags:
        bad = results[-1]
        for layout, ask in flags[1:]:  # meshes of other ranks: each hears what the one before found
            (bad,) = answers.start([(layout, ask._replace(x=bad.to(ask.x.device)))]).finish()
        taken = bad == 0 if taken is None else taken.to(bad.device) & (bad == 0)
    return totals, taken


def nonfinite_flags(items: Sequence[Item]) -> list[tuple[Any, Any]]:
    """One count of non-finite gradient elements of this rank, asked on every axis of the meshes that join all ranks.

    The largest mesh comes first; others only where they reach ranks that it does not.
    """
    if not items:
        return []
    count = sum((nonfinite_count(item.grad).to(items[0].grad.device) for item in items), start=torch.zeros(()).double())
    meshes: dict[int, Any] = {}  # one layout a mesh: a step must not compare the ranks of every parameter
    for item in items:
        meshes.setdefault(id(item.layout.mesh), item.layout)
    layouts = sorted(meshes.values(), key=lambda layout: -layout.mesh_ranks.numel())
    chosen: list[Any] = []
    for layout in layouts:
        if not chosen or not any(set(layout.mesh_ranks.tolist()) <= set(c.mesh_ranks.tolist()) for c in chosen):
            chosen.append(layout)
    return [(layout, Sum(count, over=EVERYWHERE)) for layout in chosen]


def nonfinite_count(grad: Tensor) -> Tensor:
    return (~torch.isfinite(grad)).sum().double()


def prepared(item: Item, policy: Policy) -> Tensor:
    """The gradient as the rule sees it: fp32, local view, unscaled, finite where asked, its sign turned to maximize."""
    g = item.layout.view(item.grad).float()
    if policy.grad_scale is not None:
        g = g / policy.grad_scale.to(g.device)
    if policy.nonfinite == "zero":
        g = torch.where(torch.isfinite(g), g, 0.0)
    return -g if item.group.get("maximize") else g


def step_of(item: Item, policy: Policy, totals: dict[str, Tensor], taken: Tensor | None) -> Asking:
    """The whole step of one parameter as a generator; the pieces of a large one that asks nothing follow each other."""
    t = item.state[STEP].double() + 1
    for piece in pieces(item):
        yield from step_of_piece(piece, t, policy, totals, taken)
    commit([(item.state[STEP], t)], taken)


def step_of_piece(item: Item, t: Tensor, policy: Policy, totals: dict[str, Tensor], taken: Tensor | None) -> Asking:
    """Add-ons and rule, then encode, then write."""
    layout, recipe, geo = item.layout, item.recipe, item.layout.geo
    noise = noise_of(item.state, t, geo)
    slots = Slots(item.codecs, lambda name: viewed(item, name), geo, noise, recipe.update_from == "stored")
    device = item.p.device
    h = Hyper(
        item.group,
        t=t,
        shape=geo.view,
        dtype=item.p.dtype,
        totals={name: value.to(device) for name, value in totals.items()},
    )
    p = layout.view(item.p)
    delta = yield from delta_of(p.float(), prepared(item, policy), slots, h, recipe)
    p = p if p.dtype == torch.float64 else p.float()  # float64 parameters keep their bits where nothing moves
    new = yield from recipe.write.apply(p, delta, slots, item.p.dtype, lambda: noise(PARAMETER_STREAM))
    del p, delta
    written = yield from slots.encode()
    commit([(item.p, new.view(item.p.shape)), *written], taken)


def delta_of(p: Tensor, g: Tensor, s: Slots, h: Hyper, recipe: Recipe) -> Asking:
    """What is subtracted from p: step u and every decay term, added in fp32."""
    for addon in recipe.stage("gradient"):
        g = yield from addon.gradient(p, g, s, h)
    u, step, *decay_step = yield from recipe.rule.update(p, g, s, h)
    for addon in recipe.stage("direction"):
        u = yield from addon.direction(p, g, u, s, h)
    delta = u * step
    for addon in recipe.stage("decay"):
        term = yield from addon.decay(p, u, s, h)
        if term is not None:
            delta = delta.add_(term.mul_(decay_step[0] if decay_step else h.lr))
    return delta


def commit(changes: Sequence[tuple[Tensor, Tensor]], taken: Tensor | None) -> None:
    """Write all of one parameter; on an accelerator masked by the flag, which nobody reads."""
    for target, content in changes:
        content = content.to(target.dtype)
        if (flag := masked(taken)) is not None:
            content = torch.where(flag.to(target.device), content, target)
        target.copy_(content)


def nonzero_gradients(items: Sequence[Item], answers: Any) -> int:
    """How many gradient elements of all ranks are not exactly zero (NaN counts), on the host."""
    asks = [(item.layout, Sum((item.grad != 0).sum().double(), over=EVERYWHERE)) for item in items]
    return int(sum(float(value) for value in answers.start(asks).finish()))
