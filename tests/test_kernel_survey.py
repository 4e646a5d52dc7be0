"""What is asked of all gradients before a step: the native survey against torch, and the short way through it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

import shardopt
from shardopt.addons import ClipByGlobalNorm
from shardopt.item import Policy
from shardopt.kernels.replay import Replay
from shardopt.kernels.survey import PIECE, Survey, possible
from shardopt.prelude import Share
from tests.threaded import run_threaded

pytestmark = pytest.mark.shipped
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZES = (0, 1, 63, 64, 65, 1000, PIECE - 1, PIECE, PIECE + 1, 3 * PIECE + 77)


def gradients(bad=()):
    """One of every size and dtype; `bad`: values that go into some of them."""
    made = torch.Generator().manual_seed(0)
    found = [(torch.randn(n, generator=made) * 3).to(dtype) for dtype in DTYPES for n in SIZES]
    for i, value in enumerate(bad):
        for g in found[1 + i :: 7]:
            g[-1:] = value
    return found


def looked(grads, policy, members):
    shares = [Share(None, "clip", list(part), [ClipByGlobalNorm()] * len(part)) for part in members]
    return Survey(grads, shares).run(np.array([g.data_ptr() for g in grads]), policy)


@pytest.mark.parametrize("nonfinite", ["skip", "zero"])
@pytest.mark.parametrize("scale", [None, 1024.0])
def test_counts_and_squares(nonfinite, scale):
    """Kills: a tail left out, a piece counted for its neighbour, infinity not counted, a scale multiplied."""
    grads = gradients(bad=(torch.nan, torch.inf, -torch.inf, 2.0**75, 2.0**72))
    policy = Policy(nonfinite, None if scale is None else torch.tensor(scale))
    every = range(len(grads))
    sums, count = looked(grads, policy, [every, every[1::2], []])
    tame = [g.float().abs() / (scale or 1.0) < 2.0**64 for g in grads]
    assert int(count) == sum(int((~ok).sum()) for ok in tame) > 9
    for found, members in zip(sums, (every, every[1::2], [])):
        parts = [grads[i].float() / (scale or 1.0) for i in members]
        parts = [torch.where(tame[i], g, 0.0) if nonfinite == "zero" else g for i, g in zip(members, parts)]
        total = sum((g.double().square().sum() for g in parts), start=torch.zeros((), dtype=torch.float64))
        torch.testing.assert_close(found, total, rtol=1e-13, atol=0.0, equal_nan=True)


def test_threads_do_not_change_a_bit():
    """Kills: a sum whose order is that of the threads."""
    grads, before = gradients(), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(looked(grads, Policy("skip"), [range(len(grads))])[0][0])
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]


class Longer(ClipByGlobalNorm):
    """A user's: another total under a known class's name."""

    def before(self, g):
        return super().before(g * 2)


def test_what_it_does_not_know_is_left_to_the_reference():
    """Kills: an add-on known by isinstance, a float64 gradient read as float32."""
    g = [torch.ones(3)]
    share = Share(None, "clip", [0], [Longer()])
    assert possible(g, []) and not possible(g, [share]) and not possible([torch.ones(3).double()], [])


@pytest.fixture
def short(monkeypatch):
    """What every attempt at the short way returned."""
    counted, run = [], Replay.run
    monkeypatch.setattr(Replay, "run", lambda self, *given: counted.append(run(self, *given)) or counted[-1])
    return counted


def stepped(fused, spoilt=(), scaled=False, steps=6, **options):
    """Six steps, some with a NaN; everything that could have been written after each."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape)) for shape in ((64, 64), (7, 15), (40,))]
    opt = shardopt.AdamW(params, lr=1e-2, state="int8", fused=fused, **options)
    trace = []
    for step in range(steps):
        torch.manual_seed(step)
        for p in params:
            p.grad = torch.randn(p.shape) * (4 if scaled else 1)
        if step in spoilt:
            params[1].grad[3, 3] = torch.nan
        if scaled:
            opt.grad_scale, opt.found_inf = torch.tensor(4.0 + step), torch.tensor(float(step == 4))
        opt.step()
        trace.append([t.clone() for p in params for t in (p.detach(), *opt.state[p].values())])
    return opt, trace


CASES = {
    "skip": {"nonfinite": "skip", "spoilt": (2, 3)},
    "skip the step that is looked at": {"nonfinite": "skip", "spoilt": (0, 1)},
    "clip": {"addons": ["clip_by_global_norm", "decay"], "weight_decay": 0.1},
    "skip and clip": {"nonfinite": "skip", "spoilt": (3,), "addons": [ClipByGlobalNorm(max_norm=0.5)]},
    "zero and clip": {"nonfinite": "zero", "spoilt": (3,), "addons": ["clip_by_global_norm"]},
    "scaled": {"scaled": True},
    "scaled, skip and clip": {"scaled": True, "nonfinite": "skip", "spoilt": (3,), "addons": ["clip_by_global_norm"]},
}


@pytest.mark.parametrize("case", CASES)
def test_the_short_way_asks_again(short, case):
    """Kills: a norm or a flag of the step before, a skipped step that writes or is not counted, a scale that stays."""
    (a, kernels), (b, reference) = stepped(True, **CASES[case]), stepped(False, **CASES[case])
    assert len(short) == (3 if "looked" in case else 5) and None not in short
    assert a.skipped_steps == b.skipped_steps
    for mine, theirs in zip(kernels, reference):
        assert all(torch.equal(x, y) for x, y in zip(mine, theirs, strict=True))


def test_a_step_looked_at_anew_and_skipped_is_not_taken_again(short):
    """What such a step left is the call of the one before, with its addresses. Kills: remembering that."""

    def run(fused):
        opt, _ = stepped(fused, nonfinite="skip", steps=2)
        params = opt.param_groups[0]["params"]
        for p in params:
            p.data = p.data.clone()
            p.grad = torch.full(p.shape, torch.nan)
        opt.step()
        for p in params:
            p.grad = torch.ones(p.shape)
        opt.step()
        return [p.detach() for p in params]

    assert all(torch.equal(x, y) for x, y in zip(run(True), run(False)))


@pytest.mark.parametrize("nonfinite", ["skip", "propagate"])
def test_ranks_agree(short, nonfinite):
    """A NaN on one rank is a NaN on all, a norm is everybody's. Kills: a replay that asks only its own rank."""

    def run(fused):
        def body(rank):
            mesh = init_device_mesh("cpu", (2,))
            made = torch.Generator().manual_seed(0)

            def drawn(*shape):
                return distribute_tensor(torch.randn(*shape, generator=made), mesh, [Shard(0)])

            params = [nn.Parameter(drawn(64, 64)), nn.Parameter(drawn(3, 40))]
            grads = [drawn(*p.shape) for p in params]
            opt = shardopt.AdamW(
                params, lr=0.1, addons=[ClipByGlobalNorm(max_norm=0.1)], fused=fused, nonfinite=nonfinite
            )
            for step in range(4):
                for p, g in zip(params, grads):
                    p.grad = g  # the same placements object, as of FSDP's gradients
                    g.to_local().copy_(drawn(*p.shape).to_local())
                if step == 2 and rank == 1 and nonfinite == "skip":
                    params[0].grad.to_local()[0, 0] = torch.inf
                opt.step()
            return opt.skipped_steps, [p.detach().to_local().clone() for p in params], opt.answers.collectives

        return run_threaded(2, body)

    for mine, theirs in zip(run(True), run(False)):
        assert mine[0] == theirs[0] == (nonfinite == "skip") and mine[2] == theirs[2]
        for x, y in zip(mine[1], theirs[1]):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-7)
    assert len(short) == 6 and None not in short
