"""The cost model of Muon's exchange against published and hand-made figures."""

import pytest

from shardopt.dtensor.cost import GIVEN, Costs, gram_flops, orthogonalize_flops, pipelined
from shardopt.dtensor.member import Member
from shardopt.dtensor.plan import choose, plan
from shardopt.plan.forecast import Mesh, Options, forecast
from shardopt.plan.models import members_of, shapes_of


def test_flops_of_a_matrix():
    """15a + 5 or 6a + 14 cubes of the short side, whichever way it lies. Kills: rows taken for the short side."""
    r = 1000
    assert orthogonalize_flops(r, r) == 20 * r**3
    assert orthogonalize_flops(4 * r, r) == orthogonalize_flops(r, 4 * r) == 38 * r**3
    assert gram_flops(4 * r, r, 1) == orthogonalize_flops(4 * r, r)
    assert gram_flops(4 * r, r, 2) == 26 * r**3
    total = sum(orthogonalize_flops(*shape) for shape in shapes_of("llama3-8b").values())
    assert total == pytest.approx(3.2e14, rel=0.01)
    assert sum(orthogonalize_flops(*shape) for shape in shapes_of("llama3-70b").values()) == pytest.approx(
        6.4e15, rel=0.01
    )


def test_elements_of_models():
    found = {}
    for model in ("llama3-8b", "llama3-70b", "llama3-405b", "deepseek-moe"):
        members = members_of(shapes_of(model), 8, "bf16")
        found[model] = (sum(m.count for m in members), sum(m.count * m.elements for m in members))
    assert {model: count for model, (count, _) in found.items()} == {
        "llama3-8b": 224,
        "llama3-70b": 560,
        "llama3-405b": 882,
        "deepseek-moe": 28 * 4 + 3 + 27 * (1 + 3 + 3 * 64),
    }
    assert [elements for _, elements in found.values()] == pytest.approx([6.98e9, 6.85e10, 4.02e11, 1.6e10], rel=0.01)


def test_exchanges():
    """Inside a node and across; a group of one says nothing. Kills: one bandwidth for both; own part counted."""
    costs = Costs(bandwidth_in=100, bandwidth_out=10, latency=0)
    assert costs.all_to_all(800, 8) == pytest.approx(7)
    assert costs.all_to_all(1600, 16) == pytest.approx(80)  # 8 of 16 parts go to another node, 10 B/s
    assert costs.all_gather(800, 8) == pytest.approx(7)
    assert costs.all_gather(1600, 16) == pytest.approx(18.75)  # 8 adapters, 80 B/s
    assert costs.all_gather(800, 4, stride=8) == pytest.approx(60)  # every rank on another node
    assert costs.all_gather(800, 4, stride=4) == pytest.approx(30)  # two of four on a node
    assert costs.all_reduce(800, 8) == pytest.approx(14)
    assert costs.all_to_all(800, 1) == costs.all_gather(800, 1) == 0
    assert costs.all_gather(800, 4, stride=16) == pytest.approx(60)  # no node has a whole replica
    assert costs.all_gather(800, 4) == pytest.approx(6)  # half a node
    fast = Costs(bandwidth_in=100, bandwidth_out=50, latency=0)
    assert fast.all_gather(1600, 16) == pytest.approx(15)  # 8 adapters, 400 B/s, of which a rank gets no more than 100
    late = Costs(latency=1.0)
    assert late.all_to_all(0, 1) == late.all_gather(0, 1) == 0
    assert late.all_to_all(0, 4) == 4
    assert late.all_to_all(0, 4096) == late.peers
    assert late.all_gather(0, 9) == 4


def test_products_are_bound_by_the_slowest():
    costs = Costs(gemm_flops=1e3, memory_bandwidth=1.2e4, launch=1e-3)
    assert costs.compute(5e3, 1) == 5
    assert costs.compute(1, 3e3) == 3
    assert costs.compute(1, 1, batches=2) == pytest.approx(2 * 17e-3)


def test_whole_and_gram_by_hand():
    """Of 2 shards x 3 replicas that share, each replica a node. Kills: latencies, which a bucket has once; products,
    messages or what replicas tell each other divided by the shards alone or left out; replicas taken for neighbours."""
    slow = Costs(
        gemm_flops=1, memory_bandwidth=1e30, launch=1e3, bandwidth_in=2, bandwidth_out=1, latency=1, ranks_per_node=2
    )
    whole = (6 * 4 * 4 * 16 + 14 * 4**3) / 6 + 192 / 6 * 1 / 2 / 2 + 64 / 2 * 2 / 3 / 1
    gram = (6 * 4 * 4 * 16 / 2 + 14 * 4**3) + 2 * 64 * 1 / 2 / 2
    words = f"{whole * 1e6:.3g} us a matrix whole, {gram * 1e6:.3g} us as Gram"
    assert choose(Member(rows=16, cols=4, there=2, back=1), 2, 3, slow) == ("full", words)
    assert choose(Member(rows=16, cols=0, there=2, back=1), 2, 1, slow)[0] == "full"  # of equals


def test_pipeline():
    """One bucket hides nothing; of many, all but the ends. Kills: the sum of everything; ends that are hidden."""
    assert pipelined([]) == 0
    assert pipelined([(1, 5, 2)]) == 8
    assert pipelined([(1, 5, 2)] * 3) == 1 + 15 + 2
    assert pipelined([(3, 1, 4)] * 3) == 21
    for stages in ([(1, 5, 2), (2, 1, 7), (4, 4, 1)], [(3, 1, 4)] * 5):
        first, last = stages[0][0], stages[-1][2]
        communication, compute = sum(a + c for a, _, c in stages), sum(b for _, b, _ in stages)
        assert max(communication, compute) <= pipelined(stages) <= max(communication, compute) + first + last


def test_llama_8b_on_8_ranks():
    """Everything everywhere 12 GB and 536 ms; one owner a matrix 3 GB and 67 ms, nearly all of it products."""
    members = members_of(shapes_of("llama3-8b"), 8, "bf16")
    rows = {
        way: forecast(way, members, Mesh(shards=8), Options()) for way in ("all-gather", "full", "periodic", "local")
    }
    assert rows["all-gather"].sent == pytest.approx(12.2e9, rel=0.01)
    assert rows["all-gather"].seconds == pytest.approx(0.536, rel=0.02)
    assert rows["full"].sent == pytest.approx(3.05e9, rel=0.01)
    assert rows["full"].seconds == pytest.approx(0.067, rel=0.02)
    assert rows["periodic"].sent == pytest.approx(rows["full"].sent / 5)
    assert rows["local"].sent == 0
    assert rows["local"].seconds < rows["periodic"].seconds < rows["full"].seconds


def test_llama_8b_on_8_replicas_of_8():
    """Shared: 8.6 ms of products and 1 of exchange hide behind 30 ms between the replicas; int8 halves those."""
    seconds = {}
    for wire in ("bf16", "int8"):
        members = members_of(shapes_of("llama3-8b"), 8, wire)
        seconds[wire] = plan(members, 8, 8, share=True).seconds()
    assert 0.030 < seconds["bf16"] < 0.040
    assert seconds["int8"] == pytest.approx(0.52 * seconds["bf16"], rel=0.1)
    assert plan(members, 8, 8, share=False).seconds() > 0.067


def test_costs_say_where_they_are_from():
    text = Costs(bandwidth_in=2e11, gemm_flops=5e14, measured=("bandwidth_in",)).describe()
    lines = {line.split()[0]: line for line in text.splitlines()}
    assert lines["bandwidth_in"].endswith("measured")
    assert lines["gemm_flops"].endswith("given by the caller")
    assert "400 Gb/s" in lines["bandwidth_out"]
    assert "measured" not in GIVEN.describe()


def test_a_convolution_is_one_matrix():
    """As the optimizer steps it. Kills: filters of 3 x 3 planned one by one."""
    conv, stack = members_of({"conv": (16, 8, 3, 3), "experts": (8, 64, 96)}, 2, "int8")
    assert (conv.rows, conv.cols, conv.count, conv.holders) == (16, 72, 1, None)
    assert (stack.rows, stack.cols, stack.count) == (64, 96, 8)
