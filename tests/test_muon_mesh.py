"""Muon, NorMuon and AdaMuon on every kind of mesh, through checkpoints, and beside AdamW in one optimizer."""

import math

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from shardopt.polar import NewtonSchulz
from shardopt.rules import AdamW
from tests.checkpoint_kit import BF16
from tests.resume_job import Even, check_equal, resume, run_and_save, uninterrupted
from tests.table import weights
from tests.test_mesh import CASES, build, close, distributed, on_mesh, piece, train
from tests.threaded import run_threaded
from tests.virtual import bits
from tests.whole_kit import Asker

MUONS = {
    "muon int8": lambda: rules.Muon(lr=0.02),
    "muon exact": lambda: rules.Muon(lr=0.02, wire="exact", nesterov=False, adjust_lr="spectral"),
    "muon int8+int4": lambda: rules.Muon(lr=0.02, wire="int8+int4", accumulate="sum"),
    "normuon": lambda: rules.NorMuon(lr=0.02),
    "adamuon": lambda: rules.AdaMuon(lr=0.02),
}
STATES = {"normuon": "int8", "adamuon": {"signed": "int8", "non_negative": "factored"}}


def muon(rule, state="int8"):
    """Matrices to the rule, vectors to AdamW, in one optimizer."""

    def make(ps):
        groups = [{"params": [p for p in ps if p.ndim > 1], "recipe": Recipe(rule, state, ("cautious_decay",))}]
        if vectors := [p for p in ps if p.ndim < 2]:
            groups.append({"params": vectors, "recipe": Recipe(AdamW(lr=0.01)), "lr": 0.01})
        return ShardedOptimizer(groups, weight_decay=0.1)

    return make


@pytest.mark.parametrize("name", MUONS)
@pytest.mark.parametrize("kind", CASES)
def test_equals_one_device(kind, name):
    """Muon bit by bit, parameters and every stored part; what asks sums beside it within contracts' bounds.

    Kills: the local shard orthogonalized, scales of local blocks, adjust_lr of the local shape, the rows of another
    rank in row_sq, replicas that decode different bytes.
    """
    compare(CASES[kind], muon(MUONS[name](), STATES.get(name, "int8")), bitwise="muon " in name)


def compare(case, make, bitwise):
    """A run on the mesh of a case with one on one device."""
    whole = build(case.shapes, torch.float32)
    optimizer = make(list(whole))
    train(optimizer, list(whole))
    for found, _, _ in run_threaded(math.prod(case.sizes), on_mesh(case, make, torch.float32)):
        for p, (local, state, rank, specs) in zip(whole, found):
            expected = {"p": rank.cut(p.data)}
            for part, value in optimizer.state[p].items():
                expected[part] = piece(value, rank.entries(specs[part])) if part in specs else value
            for part, value in {"p": local, **state}.items():
                if bitwise:
                    assert bits(value).equal(bits(expected[part])), (part, tuple(p.shape))
                else:
                    close(part, value, expected[part])


@pytest.mark.parametrize("rule", [rules.NorMuon, rules.AdaMuon])
@pytest.mark.parametrize("kind", ["fsdp 4", "tp rows, fsdp", "tp cols", "ep x fsdp"])
def test_norms_of_blocks_are_those_of_one_device(kind, rule):
    """Blocks begin and end anywhere in a shard. Kills: norms of the local piece of a block, rows told another block's
    norm, a shard's rows taken for consecutive ones."""
    options = {"adjust_lr": "spectral"} if rule is rules.NorMuon else {}
    case = CASES[kind]._replace(shapes=((4, 60, 32),) if "ep" in kind else ((60, 128), (60, 32)))
    compare(case, muon(rule(lr=0.02, split=(20, 4, 4, 3, 29), **options), STATES[rule.name]), bitwise=False)


def test_local_is_another_algorithm():
    """What mode="local" says of itself. Kills: a local mode that gathers, a full mode that does not."""
    case = CASES["fsdp 3"]
    whole = build(((70, 130),), torch.float32)
    train(muon(rules.Muon(lr=0.02))(list(whole)), list(whole))
    case = case._replace(shapes=((70, 130),))
    make = muon(rules.Muon(lr=0.02, mode="local"))
    for found, (rounds, _), _ in run_threaded(3, on_mesh(case, make, torch.float32)):
        local, _, rank, _ = found[0]
        assert rounds == 0 and (local - rank.cut(whole[0].data)).norm() > 1e-3 * local.norm()


def test_explain_tells_of_plan_and_mesh():
    """Kills: a mode that depends on the mesh and does not say so, a plan that nobody can read."""
    p = torch.nn.Parameter(torch.zeros(64, 96))
    assert "DEPENDS ON THE MESH" in shardopt.Muon([p], mode="local").explain()
    opt = shardopt.Muon([p])
    assert "DEPENDS" not in opt.explain()
    p.grad = torch.randn(64, 96)
    opt.step()
    assert "1 parameter of 64x96: full" in opt.explain() and "digest" in opt.explain()


def test_periodic_is_full_in_every_nth_step():
    """With its place in the period in the group, so that it is saved. Kills: a counter that a resume forgets."""
    p, q = (torch.nn.Parameter(torch.zeros(64, 96)) for _ in range(2))
    opt = shardopt.Muon([p], mode="periodic", period=3)
    again = shardopt.Muon([q], mode="periodic", period=3)
    phases = []
    for _ in range(4):
        phases.append(opt.param_groups[0]["phase"])
        p.grad = torch.randn(64, 96)
        opt.step()
    assert phases == [0, 1, 2, 0]
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[0]["phase"] == 1
    assert "phase" not in shardopt.Muon([torch.nn.Parameter(torch.zeros(8, 8))]).param_groups[0]


def test_periodic_on_a_mesh():
    """Rounds are asked in the full steps alone. Kills: a gather in every step, or a mode that ranks disagree on."""
    case = CASES["fsdp 3"]._replace(shapes=((70, 130), (33, 64)))
    make = muon(rules.Muon(lr=0.02, mode="periodic", period=2))
    assert [counts[0] for _, counts, _ in run_threaded(3, on_mesh(case, make, torch.float32))] == [2] * 3


def test_nothing_is_written_where_the_plan_does_not_fit():
    """Kills: AdamW's groups stepped before Muon's refuse."""

    def body(_):
        mesh = init_device_mesh("cpu", (2,))
        whole = (weights((8, 64)), weights((7,)))
        p = torch.nn.Parameter(distributed(whole[0].chunk(2)[mesh.get_rank()], (8, 64), mesh, (Shard(0),)))
        q = torch.nn.Parameter(whole[1].clone())
        gram = Asker(mode="gram", work=NewtonSchulz())  # which has no Gram form
        groups = [{"params": [q], "recipe": Recipe(AdamW())}, {"params": [p], "recipe": Recipe(gram)}]
        opt = ShardedOptimizer(groups)
        p.grad, q.grad = torch.ones_like(p), torch.ones(7)
        with pytest.raises(ValueError, match="in Gram form"):
            opt.step()
        assert q.detach().equal(whole[1])

    run_threaded(2, body)


MOVES = {
    "fsdp 4 to 3": ("fsdp", 4, "fsdp", 3),
    "hsdp 2x2 to fsdp 3": ("hsdp", 4, "fsdp", 3),
    "tp x fsdp 2x2 to 1": ("tp_fsdp", 4, "alone", 1),
    "1 to fsdp 4": ("alone", 1, "fsdp", 4),
}


@pytest.mark.parametrize("move", MOVES)
def test_resumes_on_another_mesh(tmp_path, move):
    """Bitwise, momentum codes included. Kills: a momentum saved by rank, a plan that outlives its mesh."""
    before, ranks_before, after, ranks_after = MOVES[move]
    options = {"rule": rules.Muon(lr=0.02), "model": Even if "tp" in move else None}
    save = (tmp_path, before, ranks_before, "int8+log8", BF16, 3)
    load = (tmp_path, after, ranks_after, "int8+log8", BF16, 6)
    run_threaded(ranks_before, lambda rank: run_and_save(*save, **options))
    want = uninterrupted("int8+log8", BF16, 6, "tp_fsdp" if "tp" in move else "alone", rule=options["rule"])
    for got in run_threaded(ranks_after, lambda rank: resume(*load, **options)):
        check_equal(got, want)
