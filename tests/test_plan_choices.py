"""What the plan chooses and says: sharing, Gram, its digest, its table, its errors."""

import os
import subprocess
import sys
from dataclasses import fields, replace
from math import ceil

import pytest

from shardopt.dtensor.buckets import blocks
from shardopt.dtensor.cost import Costs, gram_flops, orthogonalize_flops
from shardopt.dtensor.plan import LEAST_BYTES, MOST_BYTES, Plan, one_round, plan, sized
from tests.test_plan import UGLY, llama, matrix


def test_replicas_share_only_when_that_is_faster():
    """By the model: wide matrices cost more than the network, narrow ones less. Kills: always; never."""
    assert plan(llama("llama3-8b"), 8, 8).shared and plan(llama("llama3-8b"), 8, 2).shared
    narrow = plan([matrix(256, 256)] * 64, 8, 8)
    assert not narrow.shared
    assert "repeated" in narrow.sharing and "ms shared" in narrow.sharing
    assert not plan(llama("llama3-8b"), 8, 8, costs=Costs(bandwidth_out=1e9)).shared
    assert not plan([], 8, 8).shared  # nor where nothing is faster
    assert not plan(llama("llama3-8b"), 8, share=True).shared  # nobody to share with


def test_auto_takes_gram_where_it_is_shorter():
    """Two ranks, tall: Gram matrices in float32 are shorter than the matrix in bf16, longer than in 8 bits.

    Never without being asked. Kills: the short side not looked at; the wire not looked at; always Gram.
    """
    tall, square = matrix(6144, 512), matrix(512, 512)
    made = plan([tall, square, replace(tall, cut=-1), replace(tall, there=1.03, back=1.03)], 2, modes="auto")
    assert made.modes == ("gram", "full", "full", "full")
    assert "us as Gram" in made.describe() and "short side is cut" in made.describe()
    assert set(plan(llama("llama3-8b"), 8, modes="auto").modes) == {"full"}
    assert plan([tall], 2).modes == ("full",)
    for whole, shards in ((matrix(8, 8, count=2, holders=(0, 1)), 2), (matrix(8, 8), 1)):
        made = plan([whole], shards, modes="auto")
        assert made.modes == ("full",) and made.why == ("its matrices are whole already",)


@pytest.mark.parametrize("ranks", [16, 32, 64, 128])
def test_buckets_unless_told_are_as_many_as_overlap(ranks):
    """Llama-3 8B, of which 512 MB a rank would hold nearly everything. Kills: a size that is never less than that."""
    members = llama("llama3-8b", ranks, "int8")
    made, large = plan(members, ranks), plan(members, ranks, bucket_bytes=MOST_BYTES)
    assert len(made.buckets) > len(large.buckets) and len(made.buckets) >= min(3, 256 // ranks)
    assert made.seconds() < 0.97 * large.seconds()
    assert made.total.sent == large.total.sent and made.owners == large.owners


def test_buckets_of_little_and_of_one_matrix_a_rank():
    """Kills: buckets so small that latencies last longer than messages; ranks that wait for those of another bucket."""
    assert len(plan(llama("llama3-8b", 512, "int8"), 512).buckets) == 1
    assert len(plan([matrix(768, 768)] * 48, 8).buckets) == 1
    assert len(plan([matrix(4096, 4096)] * 16, 8, modes="local").buckets) == 1  # nothing to overlap with
    assert [sized(size) for size in (0, 4 * LEAST_BYTES + 400, 10**12)] == [LEAST_BYTES, LEAST_BYTES + 100, MOST_BYTES]


def test_one_round_of_the_largest():
    """To the owners and back, at both ends, and what every replica tells. Kills: what stays counted."""
    members = [matrix(64, 64), matrix(32, 32, holders=(0,)), matrix(8, 8, back=1.0), matrix(2, 2)]
    modes = ("local", "full", "full", "full")
    assert [one_round(members, modes, copies) for copies in (1, 3)] == [2 * 64 * 3, 2 * 64 * 3 + 3 * 64]


def test_summary_is_written_for_people():
    """Kills: 1 matrices, 1 buckets, bytes to the last digit."""
    one = plan([matrix(64, 64)], 1).summary()
    assert "1 matrix of 1 parameter, 4,096 elements, on 1 shard\n" in one and "1 bucket, at most 16.4 kB" in one
    many = plan(llama("llama3-8b"), 8, 2).summary()
    assert (
        "224 matrices of 224 parameters" in many and "on 8 shards x 2 replicas" in many and "busiest rank has" in many
    )


def test_gram_and_local_have_no_owner():
    made = plan([matrix(64, 8), matrix(8, 8), matrix(60, 7)], 3, modes=("gram", "full", "local"))
    assert [len(owners) for owners in made.owners] == [0, 1, 0]
    assert made.total.even == gram_flops(64, 8, 3) // 1 + orthogonalize_flops(20, 7)
    assert made.total.balance == pytest.approx((made.total.even + 20 * 8**3) / (made.total.even + 20 * 8**3 / 3))
    assert made.least == made.total.balance
    assert plan([matrix(4, 8)], 1, modes="gram").modes == ("gram",)  # nothing is cut
    summed = 2 * 8 * 8 * 4 * 2 / 3  # both halves of an all-reduce, float32
    assert made.total.sent == pytest.approx(summed + 2 * 2 * 64 * 2 / 9)


def test_digest_tells_any_difference():
    """And nothing else: not the process, not the order of a hash. Kills: a field left out; hash() of strings."""
    made = plan([matrix(*shape) for shape in UGLY], 3, 2, share=True, modes="auto")
    assert made.digest() == plan([matrix(*shape) for shape in UGLY], 3, 2, share=True, modes="auto").digest()
    other = {
        "shards": 4,
        "replicas": 3,
        "shared": False,
        "owners": made.owners[::-1],
        "buckets": (*made.buckets, ()),
        "modes": ("gram", *made.modes[1:]),
        "members": (replace(made.members[0], back=1.0), *made.members[1:]),
        "why": (),
        "sharing": "no",
    }
    assert other.keys() == {entry.name for entry in fields(Plan)}
    digests = {replace(made, **{name: value}).digest() for name, value in other.items()}
    assert len(digests | {made.digest()}) == len(other) + 1


def test_digest_is_the_same_in_every_process():
    code = (
        "from shardopt.dtensor.plan import plan; from shardopt.plan.models import members_of, shapes_of; "
        "print(plan(members_of(shapes_of('deepseek-moe'), 8, 'int8'), 8, 2).digest())"
    )
    run = [sys.executable, "-c", code]
    found = subprocess.run(run, env={**os.environ, "PYTHONHASHSEED": "7"}, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == plan(llama("deepseek-moe", 8, "int8"), 8, 2).digest()


def test_describe_names_every_parameter():
    names = [f"layer.{i}" for i in range(len(UGLY))]
    text = plan([matrix(*shape) for shape in UGLY], 3, 2, share=True).describe(names)
    assert all(name in text for name in names)
    assert "replica.shard 1." in text and "bucket 0: 8 matrices" in text
    assert "member 3" in plan([matrix(*shape) for shape in UGLY], 3).describe()
    many = plan([matrix(8, 8, count=40)], 16).describe()
    assert "shard 0, 1, 2, 3, 4, 5, 6, 7 and 8 more" in many
    assert "7 and 1 more" in plan([matrix(8, 8, count=9)], 9).describe()
    assert "more" not in plan([matrix(8, 8, count=8)], 8).describe()


def test_nothing_to_plan():
    made = plan([], 4, 2)
    assert (made.owners, made.buckets, made.buffers, made.seconds()) == ((), (), 0, 0.0)
    assert plan([matrix(0, 16), matrix(16, 0)], 4).total.sent == 0
    assert made.describe() and made.least == made.total.balance == 1.0


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: matrix(-1, 4), "must not be negative"),
        (lambda: matrix(4, 4, cut=0), "-2 \\(rows\\), -1"),
        (lambda: matrix(4, 4, count=3, holders=(0,)), "1 holders for 3 matrices"),
        (lambda: plan([], 0), "shards=0"),
        (lambda: plan([], 1, 0), "replicas=0"),
        (lambda: plan([], 1, bucket_bytes=0), "bucket_bytes=0"),
        (lambda: plan([matrix(4, 4)], 2, modes=["full", "full"]), "2 modes for 1 members"),
        (lambda: plan([matrix(4, 4)], 2, modes="periodic"), "must be one of full, gram, local, auto"),
        (lambda: plan([matrix(4, 8)], 2, modes="gram"), "use 'full' or 'auto'"),
        (lambda: plan([matrix(8, 4, holders=(1,))], 2, modes="gram"), "use 'full' or 'auto'"),
        (lambda: plan([matrix(4, 4, holders=(2,))], 2), "positions are 0 to 1"),
        (lambda: plan([matrix(4, 4, holders=(-1,))], 2), "positions are 0 to 1"),
        (lambda: Costs(bandwidth_in=0), "at least 1, in B/s"),
        (lambda: Costs(latency=-1), "at least 0, in s"),
        (lambda: Costs(measured=("speed",)), "no such field"),
    ],
)
def test_errors_say_what_to_do(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_blocks_keep_stacks_and_batches_whole():
    members = [matrix(16, 16, count=5), *[matrix(16, 32)] * 3, matrix(16, 16)]
    found = blocks(members, ("full",) * 5, 1e6)
    assert sorted(i for block in found for i in block.members) == [0, 1, 2, 3, 4]
    for block in found:
        assert {i for unit in block.units for i, _ in unit.matrices} == set(block.members)
    stack = next(block for block in found if block.members == (0,))
    assert sum(len(unit.matrices) for unit in stack.units) == 5
    assert max(len(unit.matrices) for unit in stack.units) <= ceil(5 / len(stack.units))
