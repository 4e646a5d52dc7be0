"""Virtual ranks: one parameter cut in any way and stepped by as many generators as ranks, in one process.

The cut, the geometry and the answers are computed here from index lists and torch.chunk, and share no line with
`shardopt/dtensor/answer.py` and `cut.py`.
"""

from dataclasses import dataclass, field
from itertools import pairwise, product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from shardopt.asks import Max, Mean, Sum, Whole, as_tuple, is_group
from shardopt.codecs import codec
from shardopt.codecs.geometry import Geometry
from shardopt.engine import Item, Policy, prepared, step_of
from shardopt.recipe import Recipe
from shardopt.state import make_state, part_specs


class Axis(NamedTuple):
    """A mesh axis: its size, the tensor dim that it shards (None: replicas), into how many stripes it cuts first."""

    size: int
    dim: int | None
    stripes: int = 1


Mesh = tuple[Axis, ...]  # axes in the order in which they cut


def view_of(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The block view, from contracts.md section 2 (written again here, on purpose)."""
    if len(shape) == 0:
        return (1,)
    if len(shape) <= 2 or (len(shape) == 3 and shape[2] >= 32) or (len(shape) > 3 and min(shape[-2:]) >= 32):
        return tuple(shape)
    merged = 1
    for size in shape[1:]:
        merged *= size
    return (shape[0], merged)


def indices_of(length: int, mesh: Mesh, dim: int, where: tuple[int, ...]) -> Tensor:
    """Global indices of what the rank at `where` holds of this dim, in local order."""
    held = torch.arange(length)
    for axis, place in zip(mesh, where):
        if axis.dim == dim:
            stripes = chunks(held, axis.stripes) if axis.stripes > 1 else [held]
            held = torch.cat([chunks(stripe, axis.size)[place] for stripe in stripes])
    return held


def chunks(held: Tensor, count: int) -> list[Tensor]:
    """torch.chunk, with empty pieces where it gives fewer."""
    pieces = list(torch.chunk(held, count)) if len(held) else []
    return pieces + [held[:0]] * (count - len(pieces))


def runs_of(held: Tensor) -> tuple[tuple[int, int], ...]:
    """Consecutive pieces (first, length) of a list of indices."""
    if not len(held):
        return ((0, 0),)
    breaks = [0, *(int(i) + 1 for i in (held.diff() != 1).nonzero()), len(held)]
    return tuple((int(held[a]), b - a) for a, b in pairwise(breaks))


@dataclass
class Rank:
    """What one virtual rank knows; stands in for a Layout."""

    shape: tuple[int, ...]
    mesh_axes: Mesh
    where: tuple[int, ...]
    geo: Geometry = field(init=False)
    local_shape: tuple[int, ...] = field(init=False)

    mesh = None
    sharding = ()
    ranks = 1

    def __post_init__(self) -> None:
        view = view_of(self.shape)
        self.held = [indices_of(n, self.mesh_axes, dim, self.where) for dim, n in enumerate(self.shape)]
        self.local_shape = tuple(len(held) for held in self.held)
        self.lines = self.in_view(self.held)
        self.geo = Geometry(view, tuple(runs_of(line) for line in self.lines), self.boundaries(view))

    def in_view(self, held: list[Tensor]) -> list[Tensor]:
        """Indices of the tensor's dims, as indices of the view's."""
        view = view_of(self.shape)
        if len(view) == len(self.shape):
            return held
        if not self.shape:
            return [torch.zeros(1, dtype=torch.long)]
        merged = held[1]
        for size, rest in zip(self.shape[2:], held[2:]):
            assert len(rest) == size, "inner merged dims are never cut"
            merged = (merged[:, None] * size + rest).flatten()
        return [held[0], merged]

    def boundaries(self, view: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
        """Where the owner changes along every dim of the view, over all ranks."""
        owners = [torch.full((n,), -1) for n in view]
        for number, where in enumerate(product(*(range(axis.size) for axis in self.mesh_axes))):
            lines = self.in_view([indices_of(n, self.mesh_axes, d, where) for d, n in enumerate(self.shape)])
            for dim, line in enumerate(lines):
                fresh = line[owners[dim][line] < 0]
                owners[dim][fresh] = number
        return tuple(tuple((owner.diff() != 0).nonzero().flatten().add(1).tolist()) for owner in owners)

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def view(self, local: Tensor) -> Tensor:
        return local.reshape([len(line) for line in self.lines])

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's piece of a tensor of the parameter's shape."""
        for dim, held in enumerate(self.held):
            whole = whole.index_select(dim, held)
        return whole.clone()

    def entries(self, part: Any) -> list[Tensor]:
        """Global indices of the local piece of a part, dim by dim; all of a dim whose entries straddle ranks."""
        if part.dims is None:
            return self.held
        found = []
        for dim, unit in part.dims:
            line = self.lines[dim]
            if any(cut % unit for cut in self.geo.cuts[dim]):
                assert part.reducible, "a packed byte may not straddle ranks"
                line = torch.arange(self.geo.view[dim])
            found.append(torch.unique_consecutive(line // unit))
        return found

    def new(self, part: Any, device: torch.device) -> Tensor:
        return torch.full([len(line) for line in self.entries(part)], part.fill, dtype=part.dtype, device=device)

    def axes_over(self, over: Any) -> tuple[int, ...]:
        """The mesh axes that shard any of these dims of the view."""
        ndim = len(self.geo.view)
        dims = set(range(ndim)) if over is None else {d % ndim for d in ((over,) if isinstance(over, int) else over)}
        merged = len(self.geo.view) != len(self.shape)
        return tuple(
            i
            for i, axis in enumerate(self.mesh_axes)
            if axis.dim is not None and (min(axis.dim, 1) if merged else axis.dim) in dims
        )


def world(shape: tuple[int, ...], mesh: Mesh) -> list[Rank]:
    return [Rank(shape, mesh, where) for where in product(*(range(axis.size) for axis in mesh))]


def assemble(ranks: list[Rank], entries: list[list[Tensor]], locals_: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    """The global tensor; ranks that hold the same entry must hold the same bits."""
    whole = torch.zeros(shape, dtype=locals_[0].dtype)
    seen = torch.zeros(shape, dtype=torch.bool)
    for lines, local in zip(entries, locals_):
        where = torch.meshgrid(*lines, indexing="ij") if lines else ()
        known = seen[where]
        assert bits(local)[known].equal(bits(whole[where])[known]), "replicas differ"
        whole[where], seen[where] = local, True
    assert seen.all(), "some element belongs to no rank"
    return whole


def bits(x: Tensor) -> Tensor:
    """The same bits as integers: NaN equals itself, and -0 is not 0."""
    sizes = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return x.contiguous().view(sizes[x.element_size()])


def answers(ranks: list[Rank], asks: list[Any]) -> list[Tensor]:
    """The answers to the same ask of all ranks: combined over the ranks that differ along the dims asked about."""
    ask = asks[0]
    assert all(type(other) is type(ask) for other in asks)
    if isinstance(ask, Whole):
        return worked(ranks, asks)
    over = ask.over if ask.over is not None or isinstance(ask, Max) else ask.dim
    local = [other.x if isinstance(ask, Max) else reduced(other) for other in asks]
    heard = []
    for rank in ranks:
        free = rank.axes_over(over)
        peers = [
            value
            for other, value in zip(ranks, local)
            if all(a == b for i, (a, b) in enumerate(zip(rank.where, other.where)) if i not in free)
        ]
        value = torch.stack(peers)
        if isinstance(ask, Max):
            heard.append(value.amax(0))
            continue
        value = value.sum(0)
        if isinstance(ask, Mean):
            view = rank.geo.view
            dims = range(len(view)) if over is None else ((over,) if isinstance(over, int) else over)
            for dim in dims:
                value = value / max(1, view[dim])
        heard.append(value if value.ndim == 0 else value.to(torch.float32))
    return heard


def worked(ranks: list[Rank], asks: list[Whole]) -> list[Tensor]:
    """The work of the assembled matrices, each format applied to all of them, cut as they were."""
    work, wire, mode = asks[0][1:]
    if mode == "local":
        return [work(ask.x) if ask.x.numel() else ask.x for ask in asks]
    x = assemble(ranks, [rank.lines for rank in ranks], [ask.x for ask in asks], ranks[0].geo.view)
    y = sent(work(sent(x, wire.there)), wire.back)
    found = []
    for rank in ranks:
        piece = y
        for dim, line in enumerate(rank.lines):
            piece = piece.index_select(dim, line)
        found.append(piece)
    return found


def sent(x: Tensor, spec: str) -> Tensor:
    """What arrives of x."""
    form, geo = codec(spec).for_slot(True), Geometry(tuple(x.shape), tuple(((0, n),) for n in x.shape), ((),) * x.ndim)
    try:
        next(form.encode(x, geo, None))
    except StopIteration as stop:
        return form.decode(stop.value, geo)
    raise AssertionError("a whole tensor has nothing to ask")


def reduced(ask: Sum | Mean) -> Tensor:
    x = ask.x.double()
    return x.sum() if ask.dim is None else x if ask.dim == () else x.sum(ask.dim)


class Run:
    """A parameter on virtual ranks through several steps. sums: how many sums and means were asked."""

    def __init__(self, recipe: Recipe, group: dict[str, Any], p: Tensor, mesh: Mesh = (), key: int = 12345) -> None:
        self.recipe, self.group, self.shape, self.sums = recipe, group, tuple(p.shape), 0
        self.ranks = world(self.shape, mesh)
        self.p = [rank.cut(p) for rank in self.ranks]
        view = self.ranks[0].geo.view
        self.codecs = recipe.codecs(view, p.dtype)
        key_or_none = key if recipe.noisy(view, p.dtype) else None
        self.state = [make_state(self.codecs, rank, p.device, key_or_none) for rank in self.ranks]

    def step(self, g: Tensor, policy: Policy | None = None) -> None:
        policy = policy or Policy()
        items = [
            Item(p, rank.cut(g), rank, self.recipe, self.codecs, state, self.group)
            for rank, p, state in zip(self.ranks, self.p, self.state)
        ]
        totals = {}
        for addon in self.recipe.addons:
            if addon.before_round:
                distinct = {tuple(tuple(h.tolist()) for h in item.layout.held): item for item in items}
                shares = [addon.before(prepared(item, policy)).x for item in distinct.values()]
                totals[addon.name] = torch.stack(shares).sum()
        steps = [step_of(item, policy, totals, None) for item in items]
        replies: list[Any] = [None] * len(steps)
        while (asked := advance(steps, replies)) is not None:
            columns = [answers(self.ranks, list(same)) for same in zip(*(as_tuple(a) for a in asked))]
            self.sums += sum(isinstance(ask, Sum | Mean) for ask in as_tuple(asked[0]))
            replies = [group if is_group(asked[0]) else group[0] for group in zip(*columns)]

    def parameter(self) -> Tensor:
        return assemble(self.ranks, [rank.held for rank in self.ranks], self.p, self.shape)

    def parts(self) -> dict[str, Tensor]:
        """Every stored part, assembled; step and key as they are, the same on every rank."""
        found = {}
        specs = part_specs(self.codecs, self.ranks[0])
        for name in self.state[0]:
            locals_ = [state[name] for state in self.state]
            if name not in specs:
                assert all(local.equal(locals_[0]) for local in locals_)
                found[name] = locals_[0]
                continue
            shape = specs[name].shape(self.shape, self.ranks[0].geo.view)
            found[name] = assemble(self.ranks, [rank.entries(specs[name]) for rank in self.ranks], locals_, shape)
        return found


def advance(steps: list[Any], replies: list[Any]) -> list[Any] | None:
    """What all generators ask next, or None when all are done: they must agree."""
    asked = []
    for step, reply in zip(steps, replies):
        try:
            asked.append(step.send(reply))
        except StopIteration:
            continue
    assert len(asked) in (0, len(steps)), "every rank must ask as often as every other"
    return asked or None
