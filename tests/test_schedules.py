"""Schedulers that change more than the rate: momenta switched on, rates a hair below zero, runs that resume."""

import warnings

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CyclicLR, LinearLR, OneCycleLR

import shardopt
from shardopt.rules import Adafactor, AdamW, Muon

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
OPTIMIZERS = {
    "sgd": (lambda p: shardopt.SGD(p, lr=1e-3, state="fp32"), lambda p: torch.optim.SGD(p, lr=1e-3)),
    "rmsprop": (lambda p: shardopt.RMSprop(p, lr=1e-3, state="fp32"), lambda p: torch.optim.RMSprop(p, lr=1e-3)),
}


def job(make, looked=False):
    torch.manual_seed(0)
    model = nn.Linear(40, 120)
    opt = make(model.parameters())
    assert not looked or len(opt.state) == 2
    return model, opt, OneCycleLR(opt, 1e-2, total_steps=20)


def train(model, opt, schedule, first, last):
    for step in range(first, last):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        opt.step()
        schedule.step()


@pytest.mark.parametrize("looked", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_momentum_that_a_scheduler_switches_on(name, looked):
    """Equal to torch. Kills: slots settled when the optimizer is built, or first looked at, before its scheduler."""
    ours, theirs = job(OPTIMIZERS[name][0], looked), job(OPTIMIZERS[name][1])
    train(*ours, 0, 8)
    train(*theirs, 0, 8)
    for p, q in zip(ours[0].parameters(), theirs[0].parameters()):
        assert (p - q).norm() <= 1e-6 * q.norm()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_resumes(name, tmp_path):
    """Kills: a load that compares the recipe from before the scheduler's momentum."""
    make = OPTIMIZERS[name][0]
    model, opt, schedule = job(make)
    train(model, opt, schedule, 0, 3)
    assert opt.param_groups[0]["recipe"] == opt.recipes[0].key()
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    saved = {"opt": opt.state_dict(), "schedule": schedule.state_dict()}
    for load in ("checkpoint", "state dict"):
        other, target, again = job(make)
        if load == "checkpoint":
            assert shardopt.load_checkpoint(tmp_path, other, target) == {"step": 3}
        else:
            other.load_state_dict(model.state_dict())
            target.load_state_dict(saved["opt"])
        again.load_state_dict(saved["schedule"])
        whole, optimizer, plan = job(make)
        train(whole, optimizer, plan, 0, 6)
        train(other, target, again, 3, 6)
        assert all(p.equal(q) for p, q in zip(other.parameters(), whole.parameters()))


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reports_follow_the_scheduler(name):
    """Before the first step too. Kills: a report of the recipe from before the scheduler's momentum."""
    make = OPTIMIZERS[name][0]
    assert "momentum_buffer" in job(make)[1].explain()
    assert "momentum_buffer" in shardopt.state_bytes(job(make)[1]).parts


def test_a_group_that_has_not_stepped_may_still_change():
    """Kills: "started" taken from the optimizer instead of the group."""
    a, b = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    opt = shardopt.SGD([a])
    a.grad = torch.ones(3)
    opt.step()
    opt.add_param_group({"params": [b]})
    opt.param_groups[1]["momentum"] = 0.9
    b.grad = torch.ones(3)
    opt.step()
    assert "momentum_buffer" in opt.state[b]
    opt.param_groups[0]["momentum"] = 0.9
    with pytest.raises(ValueError, match="Build the optimizer with a momentum"):
        opt.step()


def test_a_rate_a_hair_below_zero_is_no_error():
    """torch's LinearLR ends at -3e-20 for many lengths. Kills: the constructor's check of lr at every step."""
    p = nn.Parameter(torch.ones(3))
    opt = shardopt.AdamW([p], lr=1e-2)
    schedule = LinearLR(opt, end_factor=0.0, total_iters=10)
    for _ in range(11):
        p.grad = torch.ones(3)
        opt.step()
        schedule.step()
    assert opt.param_groups[0]["lr"] < 0


def test_a_state_dict_that_needs_other_slots_is_refused_before_anything_changes():
    """Kills: groups adopted first, so that the next step fails."""
    p = nn.Parameter(torch.ones(3))
    opt = shardopt.SGD([p], momentum=0.9, state="fp32")
    p.grad = torch.ones(3)
    opt.step()
    with pytest.raises(ValueError, match="momentum"):
        opt.load_state_dict(torch.optim.SGD([p], momentum=0.0).state_dict())
    opt.step()


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layer = nn.Embedding(40, 32), nn.Linear(32, 48)


CYCLES = {
    "one": lambda opt: OneCycleLR(opt, 1e-2, total_steps=20),
    "triangle": lambda opt: CyclicLR(opt, 1e-3, 1e-2, step_size_up=3, base_momentum=0.7, max_momentum=0.9),
}


@pytest.mark.parametrize("cycle", CYCLES)
@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
@pytest.mark.filterwarnings("error:.*saved with")
def test_a_momentum_cycles_in_every_group_of_a_routed_model(name, cycle, tmp_path):
    """Muon's momentum and AdamW's betas[0], bit by bit what two optimizers with two schedulers do, over a resume too.

    Kills: torch's refusal, a KeyError of betas in a group that has none, a momentum that AdamW never reads.
    """
    model, other = Small(), Small()
    options = {"lr": 1e-3, "fused": False, **({"beta1": 0.5} if name == "adafactor" else {})}
    opt = shardopt.build_optimizer(model, name, **options)
    schedule = CYCLES[cycle](opt)
    alone = shardopt.AdamW(other.embed.parameters(), state="fp32", weight_decay=0.0, fused=False)
    its = CYCLES[cycle](alone)
    for step in range(8):
        if step == 4:
            shardopt.save_checkpoint(tmp_path, model, opt, step=4)
            kept, model = schedule.state_dict(), Small()
            opt = shardopt.build_optimizer(model, name, **options)
            schedule = CYCLES[cycle](opt)
            shardopt.load_checkpoint(tmp_path, model, opt)
            schedule.load_state_dict(kept)
        for m, o, s in ((model, opt, schedule), (other, alone, its)):
            train(m, o, s, step, step + 1)
        beta = alone.param_groups[0]["betas"][0]
        opt.settle()
        groups = {group["role"]: group for group in opt.param_groups}
        its_own = {"muon": "momentum", "adafactor": "beta1"}.get(name)
        assert torch.equal(model.embed.weight, other.embed.weight)
        assert groups["embedding"]["betas"][0] == groups["vector"]["betas"][0] == beta
        assert its_own is None or groups["matrix"][its_own] == beta
        assert "momentum" not in groups["vector"]


def mixed(first):
    """A matrix to Muon, a vector to AdamW, by a group's own recipe; first: what the optimizer itself is."""
    matrix, vector = nn.Parameter(torch.ones(40, 48)), nn.Parameter(torch.ones(40))
    muon, adamw = ({"params": [p], "recipe": shardopt.Recipe(r())} for p, r in ((matrix, Muon), (vector, AdamW)))
    if first == "neither":
        return shardopt.ShardedOptimizer([muon, adamw], lr=1e-3, fused=False)
    opt = shardopt.Muon([matrix], fused=False) if first == "muon" else shardopt.AdamW([vector], fused=False)
    opt.add_param_group(adamw if first == "muon" else muon)
    return opt


@pytest.mark.parametrize("first", ["muon", "adamw", "neither"])
def test_a_momentum_cycles_in_groups_with_recipes_of_their_own(first):
    """Kills: torch's refusal where only build_optimizer says what cycles; betas of AdamW's defaults in Muon's group,
    where the scheduler writes them instead of the momentum and nobody reads them."""
    opt = mixed(first)
    groups = {group["recipe"].split("/")[0]: group for group in opt.param_groups}
    assert "betas" not in groups["muon"] and "momentum" not in groups["adamw"]
    schedule = OneCycleLR(opt, 1e-2, total_steps=20)
    for _ in range(3):
        for p in (group["params"][0] for group in opt.param_groups):
            p.grad = torch.ones_like(p)
        opt.step()
        schedule.step()
    opt.settle()
    assert groups["muon"]["momentum"] == groups["adamw"]["betas"][0] != 0.95
    assert "betas" not in groups["muon"] and "momentum" not in groups["adamw"]


def test_a_state_dict_holds_what_a_scheduler_wrote():
    """Also where nothing settled it since. Kills: a momentum beside betas[0] of the step before; Adafactor's kind of
    momentum replaced by a number, which a load takes for another option."""
    p, q = nn.Parameter(torch.ones(40, 48)), nn.Parameter(torch.ones(3))
    options = {"lr": 1e-3, "fused": False}

    def job():
        factored = shardopt.Recipe(Adafactor(beta1=0.9), "fp32")
        opt = shardopt.ShardedOptimizer(
            [{"params": [p], "recipe": factored}, {"params": [q], "recipe": shardopt.Recipe(AdamW())}], **options
        )
        return opt, OneCycleLR(opt, 1e-2, total_steps=20)

    opt, schedule = job()
    p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
    opt.step()
    schedule.step()
    saved = opt.state_dict()
    adafactor, adamw = saved["param_groups"]
    assert adafactor["momentum"] == "update" and "momentum" not in adamw
    assert adafactor["beta1"] == adamw["betas"][0] not in (0.9, 0.95)
    other, _ = job()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other.load_state_dict(saved)
    assert other.param_groups[0]["beta1"] == adafactor["beta1"]
