"""Repeated steps of what asks: the short way with standing rounds is the way through `Answers.start`."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt.kernels.replay import Replay
from tests.kernel_kit import differences
from tests.test_kernel_passes import RECIPES, SHAPES, parameters, several


@pytest.mark.parametrize("name", RECIPES)
def test_the_short_way_is_the_same_way(name, taken, monkeypatch):
    """A repeated step, whose answers lie where they lay, against the same kernels called in full: bitwise, in as many
    rounds. Kills: answers, sums or rates of the step before, an answer taken for its neighbour's, a mean over another
    count, gradients in another order."""

    def spoil(opt, ps, step):
        opt.param_groups[0]["lr"] = 1e-2 / (step + 1)
        ps[0].grad[7, 9] = 10.0**step
        if step in (2, 5):
            ps[1].data = ps[1].data.clone()

    rule, state, addons = RECIPES[name]
    again, one = several(True, rule(), state, addons, 7, spoil)
    assert taken == [True, False, True, True, False, True]
    monkeypatch.setattr(Replay, "possible", False)
    full, other = several(True, rule(), state, addons, 7, spoil)
    assert [differences(a, b) for a, b in zip(again, full)] == [[]] * len(SHAPES)
    assert one.answers.rounds == other.answers.rounds


def test_a_step_that_failed_is_not_repeated(taken):
    """It may have left the calls with answers that are gone. Kills: a short way kept beyond such a step."""

    def run(failing):
        ps = parameters(shapes=SHAPES[1:3])
        opt = shardopt.Adafactor(ps, fused=True)
        start, asked = opt.answers.start, []

        def once(round_):
            asked.append(round_)
            if len(asked) == 2:
                raise RuntimeError("lost")
            return start(round_)

        for seed in range(5):
            torch.manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape)
            if seed == 3 and failing:
                kept, ps[0].grad = ps[0].grad, ps[0].grad.t().contiguous().t()
                opt.answers.start = once
                with pytest.raises(RuntimeError, match="lost"):
                    opt.step()
                opt.answers.start, ps[0].grad = start, kept
            opt.step()
        return [{"p": p.detach(), **opt.state[p]} for p in ps]

    assert [differences(a, b) for a, b in zip(run(False), run(True))] == [[], []]
    assert taken == [True] * 4 + [True, True, False, True]


def test_a_step_that_failed_is_forgotten(taken):
    """Where the next one is skipped by all ranks, there is nothing to remember. Kills: calls of the one that failed."""
    ps = parameters(shapes=SHAPES[1:3])
    opt = shardopt.Adafactor(ps, fused=True, nonfinite="skip")
    start = opt.answers.start

    def once(round_):
        opt.answers.start = start
        raise RuntimeError("lost")

    def step(value):
        for p in ps:
            p.grad = torch.full(p.shape, value)
        opt.step()

    opt.nonfinite, opt.answers.start = "propagate", once
    with pytest.raises(RuntimeError, match="lost"):
        step(1.0)
    opt.nonfinite = "skip"
    step(torch.nan)
    assert opt.skipped_steps == 1
    step(1.0)
    step(1.0)
    assert taken == [True] and all(opt.state[p]["step"] == 2 for p in ps)


def test_calls_of_sets_that_do_not_return_are_given_up():
    """Kills: calls and their sums kept for every set of parameters that ever had gradients together."""
    torch.manual_seed(0)
    ps = [nn.Parameter(torch.randn(70, 130)) for _ in range(12)]
    opt = shardopt.Adafactor(ps, fused=True)
    for _ in range(60):
        for p in ps:
            p.grad = torch.randn(p.shape) if torch.rand(()) < 0.5 else None
        opt.step()
    assert len(opt.native.buckets.known) <= 17
    for p in ps:
        p.grad = torch.randn(p.shape)
    opt.step()
    assert opt.native.stepped == 12
