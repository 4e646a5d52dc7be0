"""Drives the rules: buckets in lock step, what they ask answered together, everything written once it is certain."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shardopt.asks import EVERYWHERE, Asking, Sum, as_tuple, is_group
from shardopt.codecs.noise import PARAMETER_STREAM
from shardopt.item import Item, Policy, asks, pieces, viewed
from shardopt.prelude import before, prepared
from shardopt.recipe import Recipe
from shardopt.rules import Hyper
from shardopt.state import STEP, Slots, noise_of

BUCKET_ELEMENTS = 1 << 26  # local elements of one bucket, by global facts: bounds what is alive in lock step
ALIVE = 3  # buckets under way at once: one computes while the messages of the others travel; 4 where replicas share


def run(items: Sequence[Item], answers: Any, policy: Policy, native: Any = None) -> Tensor | None:
    """One step of all items. Returns None, or a 0-d bool: whether the step was taken (not skipped).

    What asks nothing is stepped one parameter after another, what asks forms buckets. `native` (shardopt.kernels) steps
    both where it has a kernel, and asks what the reference does: rounds are the same on every rank, whatever it can
    compile.
    """
    totals, taken = before(items, answers, policy, native)
    if taken is not None and taken.device.type == "cpu" and not taken:
        return taken
    alone: list[Item] = []
    asking: list[Item] = []
    for item in items:
        (asking if asks(item) else alone).append(item)
    planned = list(in_buckets(asking, answers))  # raises where ranks or modes do not fit: before anything is written
    for item in native.step(alone, asking, totals, policy, masked(taken)) if native is not None else alone:
        for asked in step_of(item, policy, totals, taken):
            raise AssertionError(f"{item.recipe.key()} asks {asked}, but says that it asks nothing")

    def steps_of(bucket: Sequence[Item]) -> Iterator[None]:
        steps, left = native.passes(bucket, totals, policy, masked(taken)) if native else ([], range(len(bucket)))
        steps = [*steps, *(speaking(i, step_of(bucket[i], policy, totals, taken)) for i in left)]
        return drive(steps, [item.layout for item in bucket], answers)

    abreast(map(steps_of, planned), answers)
    return taken


def abreast(buckets: Iterable[Iterator[None]], answers: Any) -> None:
    """Drive all buckets to their ends, several under way at once; the order of the messages depends on nothing else."""
    places = max(ALIVE, 1 + answers.scheduled.messages)
    alive: list[Iterator[None]] = []
    for bucket in buckets:
        alive = advance([*alive, bucket], places)
    while alive:
        alive = advance(alive)


def masked(taken: Tensor | None) -> Tensor | None:
    """The flag, where only the device knows it."""
    return taken if taken is not None and taken.device.type != "cpu" else None


def advance(alive: list[Iterator[None]], places: int = ALIVE) -> list[Iterator[None]]:
    """One message of every bucket under way, the latest first; the first is then driven to its end if no place is free.

    So a bucket's first message is on its way while the one before works on what came, and the result of the one
    before that is waited for last of all.
    """
    going = [bucket for bucket in reversed(alive) if next(bucket, STOPPED) is None][::-1]
    if len(going) == places:
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


def in_buckets(items: Sequence[Item], answers: Any) -> Iterator[list[Item]]:
    """What asks for whole matrices as it was planned, then the rest."""
    wanted = [item.recipe.rule.whole(item.layout.geo.view) for item in items]
    whole = [(item, want) for item, want in zip(items, wanted) if want is not None]
    for bucket in answers.announce([(item.layout, want) for item, want in whole]):
        yield [whole[i][0] for i in bucket]
    yield from buckets(item for item, want in zip(items, wanted) if want is None)


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


def only_initialises(items: Sequence[Item], groups: Sequence[Mapping[str, Any]], answers: Any) -> bool:
    """DCP's and torchtitan's first step, with lr 0 and zero gradients, only wants state to exist: it does."""
    rates = [group.get("lr") for group in groups]
    if not items or any(isinstance(lr, Tensor) and lr.device.type != "cpu" for lr in rates):
        return False
    if any(lr is None or float(lr) != 0 for lr in rates):
        return False
    asks = [(item.layout, Sum((item.grad != 0).sum().double(), over=EVERYWHERE)) for item in items]  # NaN counts
    return not any(float(value) for value in answers.start(asks).finish())
