"""What is planned for one parameter that asks `Whole`: formats, who holds what, the owners of its matrices."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shardopt.codecs.sendable import wire_codec
from shardopt.dtensor.held import Held, count_of, holdings
from shardopt.dtensor.layout import Layout, describe
from shardopt.dtensor.member import Member
from shardopt.dtensor.plan import Plan
from shardopt.dtensor.team import Team
from shardopt.dtensor.wire import Format


@dataclass(frozen=True, eq=False)
class Task:
    """One parameter as a member of a plan. team: those who hold its shards; replicas: those who hold the same one."""

    layout: Layout
    work: Any
    there: Format
    back: Format
    held: tuple[Held, ...]
    team: Team
    replicas: Team
    plan: Plan
    member: int

    @property
    def mode(self) -> str:
        return self.plan.modes[self.member]

    @property
    def owners(self) -> tuple[int, ...]:
        return self.plan.owners[self.member]

    @property
    def owners_hold(self) -> bool:
        """Whether every matrix lies whole on the shard of its owner."""
        holders = self.plan.members[self.member].holders
        return holders is not None and all(o % self.team.size == h for o, h in zip(self.owners, holders))

    @property
    def moves(self) -> bool:
        """Whether some matrix travels between shards."""
        return self.mode == "full" and self.team.size > 1 and not self.owners_hold

    @property
    def share(self) -> int:
        """Elements on a rank, by global facts."""
        return self.layout.numel // self.layout.ranks

    @property
    def cut(self) -> int:
        """The long dim, -2 or -1, where the mode is "gram": the one that the shards cut."""
        cut = self.plan.members[self.member].cut
        assert cut is not None, "the plan is only asked for the Gram form of what is cut"
        return cut


def formats_of(layout: Layout, wire: Any) -> tuple[Format, Format]:
    if len(layout.geo.view) < 2:
        raise ValueError(f"{describe(layout)} is a vector; only matrices can be brought whole to one rank")
    there, back = (Format(wire_codec(spec), *layout.geo.view[-2:]) for spec in wire)
    return there, back


def member_of(layout: Layout, work: Any, there: Format, back: Format) -> Member:
    rows, cols = layout.geo.view[-2:]
    cut = [dim for dim in (-2, -1) if layout.axes[dim]]
    return Member(
        rows=rows,
        cols=cols,
        count=count_of(layout.geo.view),
        holders=holders_of(layout, holdings(layout)),
        cut=cut[0] if len(cut) == 1 and layout.axes[cut[0]] == layout.sharding else None,
        flops=work.flops(rows, cols),
        there=there.element_bytes,
        back=back.element_bytes,
        name=layout.name,
    )


def holders_of(layout: Layout, held: Sequence[Held]) -> tuple[int, ...] | None:
    """Of every matrix the position that holds all of it; None where some matrix has none."""
    rows, cols = layout.geo.view[-2:]
    found: dict[int, int] = {}
    for position, mine in enumerate(held):
        if mine.rows == ((0, rows),) and mine.cols == ((0, cols),):
            found.update(dict.fromkeys(mine.matrices, position))
    count = count_of(layout.geo.view)
    return tuple(found[i] for i in range(count)) if len(found) == count else None


def mode_asked(work: Any, member: Member, mode: str) -> str:
    """What the planner is asked for: it chooses only between modes that the work knows."""
    if mode in ("gram", "auto") and not hasattr(work, "gram_factor"):
        if mode == "gram":
            raise ValueError(f"mode 'gram' needs an orthogonalizer in Gram form, not {work.key()}; use mode 'full'")
        return "full"
    unfit = mode == "gram" and not member.long_side_cut  # nothing to sum, or not all of the short side
    return "full" if unfit else mode
