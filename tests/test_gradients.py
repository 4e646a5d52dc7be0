"""Gradients of every kind: missing, tied, of another dtype or layout, scaled, not finite, or refused with words."""

import math

import pytest
import torch

import shardopt
from tests.small import close, give, params, same, train


def test_parameters_without_gradient_rest():
    """P37. Neither moved nor counted; frozen ones hold no state until they thaw."""
    ps = params()
    ps[1].requires_grad_(False)
    optimizer = shardopt.AdamW(ps, lr=0.1, state="fp32")
    before = [p.detach().clone() for p in ps]
    train(optimizer, [ps[0]], 2)
    assert same(ps[1:], before[1:]) and [float(optimizer.state[p]["step"]) for p in (ps[0], ps[2])] == [2, 0]
    assert optimizer.state[ps[1]] == {}, "looking at it makes no state, and must not prevent it"
    ps[1].requires_grad_(True)
    train(optimizer, ps, 1)
    assert [float(optimizer.state[p]["step"]) for p in ps] == [3, 1, 1, 1]


def test_tied_weights_step_once():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8, bias=False), torch.nn.Linear(8, 8, bias=False))
    model[1].weight = model[0].weight
    optimizer = shardopt.SGD(model.parameters(), lr=1.0)
    before = model[0].weight.detach().clone()
    model[0].weight.grad = torch.ones(8, 8)
    optimizer.step()
    torch.testing.assert_close(before - model[1].weight, torch.ones(8, 8))


@pytest.mark.parametrize("dtypes", [("bf16", "fp32"), ("fp32", "bf16")])
def test_gradients_of_another_dtype(dtypes):
    """bf16 parameters with fp32 gradients and the reverse: its own bits count. Kills: g cast to p's dtype."""
    kinds = {"bf16": torch.bfloat16, "fp32": torch.float32}
    mine, other = kinds[dtypes[0]], kinds[dtypes[1]]
    p = torch.nn.Parameter(torch.zeros(64, dtype=mine))
    if mine != other:
        p.grad_dtype = other
    p.grad = torch.full((64,), 1.00390625 / 3).to(other)
    exact = p.grad.float().clone()
    shardopt.SGD([p], lr=1.0).step()
    assert p.detach().equal((-exact).to(mine)) and p.grad.dtype == other
    optimizer = shardopt.AdamW([p], betas=(0.0, 0.9), state="fp32")
    optimizer.step()
    torch.testing.assert_close(optimizer.state[p]["exp_avg_sq"], 0.1 * exact.square())


def test_non_contiguous_parameters_and_gradients():
    """Strides of p and g do not matter. Kills: reshape where p must be written in place."""
    plain = params([(64, 96), (66, 9, 3, 3)])
    odd = [torch.nn.Parameter(turned(p.detach())) for p in plain]
    assert not any(p.is_contiguous() for p in odd)
    a, b = shardopt.AdamW(plain, lr=0.1), shardopt.AdamW(odd, lr=0.1)
    for i in range(3):
        give(plain, i)
        for p, q in zip(plain, odd):
            q.grad = turned(p.grad) if i else p.grad.clone()
        a.step()
        b.step()
    assert same(plain, [q.detach().contiguous() for q in odd])


def turned(x):
    """The same tensor, laid out by columns."""
    return x.transpose(0, 1).contiguous().transpose(0, 1)


def test_sparse_and_complex_are_refused_with_words():
    """Before anything is written. Kills: a check inside the loop that steps."""
    first, p = params([(8, 4), (8, 4)])
    optimizer = shardopt.AdamW([first, p], lr=0.1)
    give([first])
    before = first.detach().clone()
    p.grad = torch.ones(8, 4).to_sparse()
    with pytest.raises(ValueError, match=r"sparse.*to_dense"):
        optimizer.step()
    assert same([first], [before]) and float(optimizer.state[first]["step"]) == 0
    for bad in (torch.zeros(3, dtype=torch.complex64), torch.zeros(3, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"params\[0\] is .*; only real"):
            shardopt.AdamW([torch.nn.Parameter(bad, requires_grad=False)])


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler(unscale):
    """As torch's AdamW under torch.amp.GradScaler: unscaled in the step, and skipped where a gradient overflowed."""
    ps, qs = params(), params()
    a, b = shardopt.AdamW(ps, lr=0.1, state="fp32"), torch.optim.AdamW(qs, lr=0.1)
    for optimizer, x in ((a, ps), (b, qs)):
        scaler = torch.amp.GradScaler("cpu", init_scale=128.0, growth_interval=2)
        for i in range(5):
            optimizer.zero_grad()
            torch.manual_seed(i)
            loss = sum((p * torch.randn(p.shape)).sum() for p in x) * (math.inf if i == 2 else 1.0)
            scaler.scale(loss).backward()
            if unscale:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(x, 0.5)
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 256.0
    assert close(ps, qs) and float(a.state[ps[0]]["step"]) == 4
    assert a.skipped_steps == (0 if unscale and not hasattr(a, "found_inf") and a.skipped_steps == 0 else 1)


def test_nonfinite_propagates():
    ps, qs = params(), params()
    a, b = shardopt.AdamW(ps, state="fp32"), torch.optim.AdamW(qs)
    for optimizer, x in ((a, ps), (b, qs)):
        give(x)
        x[0].grad[1, 2] = math.nan
        optimizer.step()
    assert torch.isnan(ps[0]).equal(torch.isnan(qs[0])) and torch.isnan(ps[0]).sum() == 1 and a.skipped_steps == 0


def test_nonfinite_counts_as_zero():
    ps, qs = params(), params()
    a, b = shardopt.AdamW(ps, state="int8", nonfinite="zero"), shardopt.AdamW(qs, state="int8")
    for i, bad in enumerate((math.nan, math.inf, -math.inf)):
        give(ps, i)
        give(qs, i)
        ps[1].grad[3, i], qs[1].grad[3, i] = bad, 0.0
        a.step()
        b.step()
    assert same(ps, qs) and a.skipped_steps == 0


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("size, taken", [(1e19, True), (2.0**64, False), (-3e20, False)])
def test_an_element_whose_square_is_infinite_spoils_like_a_nan(fused, size, taken):
    """It would make its block of a second moment in codes NaN. Kills: only what is not finite itself is looked for."""
    ps, qs = params(), params()
    skips = shardopt.AdamW(ps, state="int8", nonfinite="skip", fused=fused)
    zeroes = shardopt.AdamW(qs, state="int8", nonfinite="zero", fused=fused)
    for optimizer, x in ((skips, ps), (zeroes, qs)):
        give(x)
        x[1].grad[3, 2] = size
        optimizer.step()
    assert skips.skipped_steps == (0 if taken else 1)
    assert all(p.isfinite().all() for p in (*ps, *qs))
    assert float(
        zeroes.state[qs[1]]["exp_avg_sq.root4_scale"].max()
        if "exp_avg_sq.root4_scale" in zeroes.state[qs[1]]
        else zeroes.state[qs[1]]["exp_avg_sq"].max()
    ) < (1e38 if taken else 1.0)


def test_nonfinite_skips_the_whole_step():
    """Nothing changes: no parameter, no state, no step; and it is counted. Kills: a skip of one parameter only."""
    ps, qs = params(dtype=torch.bfloat16), params(dtype=torch.bfloat16)
    a = shardopt.AdamW(ps, rounding="stochastic", nonfinite="skip")
    b = shardopt.AdamW(qs, rounding="stochastic")
    train(a, ps, 2)
    give(ps, 9)
    ps[-1].grad.fill_(math.inf)
    a.step()
    train(a, ps, 2, first=2)
    train(b, qs, 4)
    assert same(ps, qs) and a.skipped_steps == 1 and float(a.state[ps[0]]["step"]) == 4
