"""The plan of whole-matrix orthogonalization: which rank orthogonalizes which matrix, in which bucket.

A pure function of global facts: every rank computes the same plan without a message, and a laptop computes it for
thousands of ranks. `digest()` is what ranks compare once; `describe()` is what one reads.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import blake2b

from shardopt.dtensor.buckets import Block, blocks, by_start, cut, divided, units_in
from shardopt.dtensor.cost import GIVEN, GRAM_BYTES, Costs, gram_flops, pipelined
from shardopt.dtensor.member import Member
from shardopt.dtensor.owners import shortest
from shardopt.dtensor.tally import Tally
from shardopt.spelling import choice, counted, in_bytes

MODES = ("full", "gram", "local", "auto")
MOST_BYTES, LEAST_BYTES = 512_000_000, 32_000_000  # of a bucket, unless told: memory; what latencies would not eat up
FEWEST = 4  # buckets of what is more than so many times LEAST_BYTES, so that exchange and work overlap


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who does what. Positions are replica * shards + shard; where `shared` is False the replica is 0 and all replicas
    do the same.

    owners: [member][matrix] -> position, empty for a member that is not "full". buckets: members, in order. modes: of
    every member, "full", "gram" (cut along the long side, products of the short side summed) or "local". why: of
    every member, what decided its mode; sharing: what decided whether replicas share the work.
    """

    shards: int
    replicas: int
    shared: bool
    owners: tuple[tuple[int, ...], ...]
    buckets: tuple[tuple[int, ...], ...]
    modes: tuple[str, ...]
    members: tuple[Member, ...] = ()
    why: tuple[str, ...] = ()
    sharing: str = ""

    def digest(self) -> str:
        """Equal for equal plans only: every field goes in."""
        return blake2b(repr(self).encode(), digest_size=16).hexdigest()

    def tally(self, chosen: Sequence[int]) -> Tally:
        """What these members cost the ranks."""
        tally = Tally(self.shards, self.replicas, self.shared)
        for i in chosen:
            tally.add(self.members[i], self.modes[i], self.owners[i])
        return tally

    @cached_property
    def tallies(self) -> tuple[Tally, ...]:
        """Of every bucket."""
        return tuple(self.tally(bucket) for bucket in self.buckets)

    @cached_property
    def total(self) -> Tally:
        return self.tally(range(len(self.members)))

    @property
    def buffers(self) -> int:
        """Bytes of messages on the fullest rank: three buckets that follow one another are on the way at once."""
        sizes = [tally.buffers for tally in self.tallies]
        return max((sum(sizes[i : i + 3]) for i in range(len(sizes))), default=0)

    @property
    def least(self) -> float:
        """The longest share over the mean that no assignment of whole matrices can get below."""
        single = units_in(blocks(self.members, self.modes, 0))
        total = self.total
        copies = total.positions // total.shards
        return (shortest(single, self.shards, copies) + total.even) / total.mean if total.mean else 1.0

    def seconds(self, costs: Costs = GIVEN) -> float:
        """Predicted time of a step's exchange and orthogonalization, buckets pipelined."""
        return pipelined([tally.stages(costs) for tally in self.tallies])

    def summary(self) -> str:
        """The plan as a whole, in a few lines."""
        total, largest = self.total, max((tally.buffers for tally in self.tallies), default=0)
        replicas = f" x {self.replicas} replicas" if self.replicas > 1 else ""
        return "\n".join(
            (
                f"{counted(total.matrices, 'matrix', 'matrices')} of {counted(len(self.members), 'parameter')}, "
                f"{total.elements:,} elements, on {counted(self.shards, 'shard')}{replicas}",
                f"{total.mean:.4g} FLOP a rank on average; the busiest rank has {total.balance:.3f} times that, no "
                f"assignment could bring it below {self.least:.3f}",
                f"{in_bytes(total.sent)} sent a rank; {counted(len(self.buckets), 'bucket')}, at most "
                f"{in_bytes(largest)} of encoded matrices on a rank, {in_bytes(self.buffers)} with three under way",
                *([f"replicas: {self.sharing}"] if self.sharing else []),
                f"digest {self.digest()}",
            )
        )

    def describe(self, names: Sequence[str] | None = None) -> str:
        """A readable table: the summary, then every bucket with its members and their owners."""
        names = names or [called(i, member) for i, member in enumerate(self.members)]
        lines = [self.summary()]
        for k, (bucket, tally) in enumerate(zip(self.buckets, self.tallies)):
            lines.append(
                f"bucket {k}: {counted(tally.matrices, 'matrix', 'matrices')}, {tally.elements:,} elements, "
                f"{in_bytes(tally.buffers)} on a rank; the busiest rank has {tally.balance:.3f} times the mean FLOP"
            )
            for i in bucket:
                why = f"  ({self.why[i]})" if self.why[i] else ""
                lines.append(f"  {names[i]:40} {self.members[i].shape:>18} {self.modes[i]:5} {self.place(i)}{why}")
        return "\n".join(lines)

    def place(self, i: int) -> str:
        """In words: who orthogonalizes a member."""
        if self.modes[i] != "full":
            return "every shard its piece"
        runs = []
        for position in dict.fromkeys(self.owners[i]):
            replica, shard = divmod(position, self.shards)
            runs.append(f"{replica}.{shard}" if self.shared else f"{shard}")
        shown = ", ".join(runs[:8]) + (f" and {len(runs) - 8} more" if len(runs) > 8 else "")
        return f"{'replica.shard' if self.shared else 'shard'} {shown}"


def plan(
    members: Sequence[Member],
    shards: int,
    replicas: int = 1,
    *,
    modes: Sequence[str] | str = "full",
    share: bool | None = None,
    bucket_bytes: int | None = None,
    costs: Costs = GIVEN,
) -> Plan:
    """Plan for `shards` ranks that share the elements and `replicas` copies of them.

    modes: one for all or one a member; "auto" chooses between full and gram by the cost model. share: whether replicas
    divide the work and tell each other the results; None lets the cost model decide. bucket_bytes: bound of a
    bucket's messages on a rank, but room for one matrix a rank; None: see `usual`. ValueError where members, modes or
    sizes do not fit.
    """
    members = tuple(members)
    asked = (modes,) * len(members) if isinstance(modes, str) else tuple(modes)
    check(members, asked, shards, replicas, bucket_bytes)
    choices = [False, True] if share is None and replicas > 1 else [bool(share) and replicas > 1]
    built = [build(members, asked, shards, replicas, choice, bucket_bytes, costs) for choice in choices]
    if len(built) == 1:
        return built[0]
    alone, together = (each.seconds(costs) for each in built)
    words = f"{together * 1e3:.3g} ms shared, {alone * 1e3:.3g} ms when every replica does all of it"
    return replace(
        built[together < alone], sharing=f"the work is {'shared' if together < alone else 'repeated'}: {words}"
    )


def build(
    members: tuple[Member, ...],
    asked: Sequence[str],
    shards: int,
    replicas: int,
    shared: bool,
    bucket_bytes: int | None,
    costs: Costs,
) -> Plan:
    copies = replicas if shared else 1
    chosen = [
        choose(member, shards, copies, costs) if mode == "auto" else (mode, "") for member, mode in zip(members, asked)
    ]
    modes = tuple(mode for mode, _ in chosen)
    sequence, positions = divided(members, modes, shards, copies)
    owners: list[list[int]] = [[-1] * member.count if mode == "full" else [] for member, mode in zip(members, modes)]
    for unit, position in zip(units_in(sequence), positions):
        for i, matrix in unit.matrices:
            owners[i][matrix] = position
    whole = Plan(
        shards=shards,
        replicas=replicas,
        shared=shared,
        owners=tuple(map(tuple, owners)),
        buckets=(),
        modes=modes,
        members=members,
        why=tuple(why for _, why in chosen),
    )
    buckets = cut(
        by_start(sequence, positions),
        lambda: Tally(shards, replicas, shared),
        lambda tally, i: tally.add(members[i], modes[i], owners[i]),
        max(bucket_bytes or usual(whole.total), one_round(members, modes, copies)),
    )
    return replace(whole, buckets=tuple(in_order(bucket) for bucket in buckets))


def usual(whole: Tally) -> int:
    """Bytes of a bucket where nothing was said: a quarter of everything, unless there is nothing to overlap."""
    return sized(whole.buffers) if whole.sent else MOST_BYTES


def sized(everything: int) -> int:
    """Bytes of a bucket, from those of all matrices on the fullest rank."""
    return min(MOST_BYTES, max(LEAST_BYTES, everything // FEWEST))


def in_order(bucket: Sequence[Block]) -> tuple[int, ...]:
    return tuple(i for block in bucket for i in block.members)


def one_round(members: Sequence[Member], modes: Sequence[str], copies: int) -> int:
    """Bytes of buffers when every rank owns one matrix of the largest kind: below that, ranks would idle."""
    told = copies if copies > 1 else 0
    travelling = [each for each, mode in zip(members, modes) if mode == "full" and each.holders is None]
    return max((2 * (each.bytes_there + each.bytes_back) + told * each.bytes_back for each in travelling), default=0)


def choose(member: Member, shards: int, copies: int, costs: Costs) -> tuple[str, str]:
    """Full or gram for one member, and why: the shorter of exchange plus products, latencies left to the bucket."""
    if member.holders is not None or shards == 1:
        return "full", "its matrices are whole already"
    if not member.long_side_cut:
        return "full", "the short side is cut, Gram needs all of it"
    packed = replace(costs, latency=0.0, launch=0.0)
    r, positions = min(member.rows, member.cols), shards * copies
    full = packed.compute(member.flops / positions, member.elements / positions)
    full += packed.all_to_all((member.bytes_there + member.bytes_back) / positions, shards)
    full += packed.all_gather(member.bytes_back / shards, copies, stride=shards)
    gram = packed.compute(gram_flops(member.rows, member.cols, shards), member.elements / shards)
    gram += packed.all_reduce(r * r * GRAM_BYTES, shards)
    words = f"{full * 1e6:.3g} us a matrix whole, {gram * 1e6:.3g} us as Gram"
    return ("gram" if gram < full else "full"), words


def called(i: int, member: Member) -> str:
    """What an error calls a member."""
    return member.name or f"member {i}"


def check(
    members: Sequence[Member], modes: Sequence[str], shards: int, replicas: int, bucket_bytes: int | None
) -> None:
    """ValueError where the arguments do not fit together."""
    for name, value in (("shards", shards), ("replicas", replicas), ("bucket_bytes", bucket_bytes)):
        if value is not None and value < 1:
            raise ValueError(f"plan({name}={value}): must be at least 1")
    if len(modes) != len(members):
        raise ValueError(
            f"plan(modes=...): {len(modes)} modes for {len(members)} members; give one for all, or one each"
        )
    for i, (member, mode) in enumerate(zip(members, modes)):
        choice(f"the mode of {called(i, member)}", mode, MODES)
        if mode == "gram" and shards > 1 and not member.long_side_cut:
            raise ValueError(
                f"mode 'gram' of {called(i, member)} ({member.shape}, cut={member.cut}): every shard must hold a piece "
                "of the long side and all of the short one; use 'full' or 'auto'"
            )
        if any(not 0 <= holder < shards for holder in member.holders or ()):
            raise ValueError(f"holders {member.holders} of {called(i, member)}: positions are 0 to {shards - 1}")
