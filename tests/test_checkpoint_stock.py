"""torch's own checkpoints and torch's own loading."""

import warnings
from itertools import product

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import shardopt
from shardopt import ShardedOptimizer
from shardopt.codecs import view_shape
from shardopt.rules import Lion
from tests.checkpoint_kit import BF16, FP32, decoded, job, torchs, tree
from tests.resume_job import (
    build,
    check_equal,
    contents,
    optimizer,
    train,
    uninterrupted,
)
from tests.table import STATES

# --- foreign checkpoints


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("state", ["fp32", "int8+log8", "sqrt8+factored"])
def test_loads_what_torch_saved(tmp_path, state, flat):
    model, opt = torchs(3)
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    optim = get_optimizer_state_dict(model, opt, options=options)
    dcp.save({"model": get_model_state_dict(model), "opt": optim}, checkpoint_id=tmp_path)
    other = build("alone", dtype=FP32)
    target = optimizer(other, state, rounding="nearest")
    target.param_groups[0]["lr"] = 123.0
    assert shardopt.load_checkpoint(tmp_path, other, target, optim_key="opt") == {"step": 3}
    assert target.param_groups[0]["lr"] == 1e-2 and target.param_groups[0]["betas"] == (0.83, 0.957)
    assert target.calls >= 1
    for p, q in zip(model.parameters(), other.parameters()):
        for slot in ("exp_avg", "exp_avg_sq"):
            x, y = opt.state[p][slot], decoded(target, q, slot).reshape(p.shape)
            assert torch.equal(x, y) if state == "fp32" else (x - y).norm() <= 0.8 * x.norm()
    train(model, opt, 3, 5)
    train(other, target, 3, 5)
    if state == "fp32":
        for p, q in zip(model.parameters(), other.parameters()):
            assert (p - q).abs().max() <= 1e-6


@pytest.mark.parametrize("stock", [True, False], ids=["stock", "ours"])
def test_torch_loads_what_we_saved_in_fp32(tmp_path, stock):
    model, opt = job("fp32", FP32, 3)
    folder = shardopt.save_checkpoint(tmp_path, model, opt, step=3).wait()
    other, target = torchs()
    if stock:
        state = tree(other, target)
        dcp.load(state, checkpoint_id=folder)
        set_model_state_dict(other, state["model"])
        set_optimizer_state_dict(other, target, state["optim"])
    else:
        assert shardopt.load_checkpoint(tmp_path, other, target) == {"step": 3}
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][k], target.state[q][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    train(model, opt, 3, 6)
    train(other, target, 3, 6)
    for p, q in zip(model.parameters(), other.parameters()):
        assert (p - q).abs().max() <= 1e-6


def test_torchs_optimizers_save_too_and_refuse_codes(tmp_path):
    model, opt = torchs(3)
    shardopt.save_checkpoint(tmp_path / "a", model, opt, step=3, extra={"x": [1]})
    other, target = torchs()
    assert shardopt.load_checkpoint(tmp_path / "a", other, target) == {"x": [1], "step": 3}
    train(model, opt, 3, 5)
    train(other, target, 3, 5)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), other.parameters()))
    shardopt.save_checkpoint(tmp_path / "b", *job("int8+log8", FP32, 1), step=1)
    with pytest.raises(ValueError, match=r"exp_avg is not in .* holds exp_avg.int8"):
        shardopt.load_checkpoint(tmp_path / "b", *torchs())


def test_a_stock_checkpoint_of_ours_is_recognised(tmp_path):
    """Without a manifest the formats are read from names, shapes and dtypes."""
    model, opt = job("dyn8", FP32, 3)
    dcp.save(tree(model, opt), checkpoint_id=tmp_path)
    other, target = job("dyn8")
    assert shardopt.load_checkpoint(tmp_path, other, target) == {"step": 3}
    check_equal(contents(other, target), contents(model, opt))
    other, target = job("fp32")
    shardopt.load_checkpoint(tmp_path, other, target)
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(decoded(opt, p, "exp_avg"), target.state[q]["exp_avg"].view(view_shape(tuple(p.shape))))
    with pytest.raises(ValueError, match=r"adamw/dyn8.*lion/"):
        shardopt.load_checkpoint(tmp_path, *job("fp32", rule=Lion()))


def test_foreign_state_of_another_rule_is_refused(tmp_path):
    model, opt = torchs(1)
    dcp.save(tree(model, opt), checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match=r"torch.optim's adamw.*lion/fp32.*the saved rule"):
        shardopt.load_checkpoint(tmp_path, *job("fp32", rule=Lion()))
    with pytest.raises(ValueError, match=r"'optimizer'.*model, optim.*optim_key"):
        shardopt.load_checkpoint(tmp_path, *job("fp32"), optim_key="optimizer")
    with pytest.raises(ValueError, match=r"'net'.*model, optim.*model_key"):
        shardopt.load_checkpoint(tmp_path, *job("fp32"), model_key="net")


def sgds(kind, steps=0, **options):
    model = build("alone", dtype=FP32)
    opt = kind(model.parameters(), lr=0.01, **options)
    train(model, opt, 0, steps)
    return model, opt


@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_loads_torchs_sgd_which_counts_no_steps(tmp_path, momentum):
    """Kills: a KeyError for the missing step counts, or those that were here kept; `no state` where SGD has none."""
    model, opt = sgds(torch.optim.SGD, 2, momentum=momentum)
    dcp.save(tree(model, opt), checkpoint_id=tmp_path)
    other, target = sgds(shardopt.SGD, 3, momentum=momentum, state="fp32")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(lacks|holds)")
        assert shardopt.load_checkpoint(tmp_path, other, target) == {"step": int(momentum > 0)}
    train(model, opt, 2, 4)
    train(other, target, 2, 4)
    assert all((p - q).abs().max() <= 1e-6 for p, q in zip(model.parameters(), other.parameters()))


def test_switches_and_momentum_are_compared_not_adopted(tmp_path):
    """Kills: nesterov taken over, or another one without a word; a momentum of 0 taken over, the next step failing."""
    dcp.save(tree(*sgds(torch.optim.SGD, 1, momentum=0.9, nesterov=True)), checkpoint_id=tmp_path / "a")
    dcp.save(tree(*sgds(torch.optim.SGD, 1)), checkpoint_id=tmp_path / "b")
    dcp.save(tree(*sgds(torch.optim.RMSprop, 1, centered=True)), checkpoint_id=tmp_path / "c")
    model, opt = sgds(shardopt.SGD, 1, momentum=0.9)
    with pytest.warns(UserWarning, match="saved with nesterov=True; here it has nesterov=False"):
        shardopt.load_checkpoint(tmp_path / "a", model, opt)
    assert opt.param_groups[0]["nesterov"] is False
    before = contents(model, opt)
    with pytest.raises(ValueError, match=r"'momentum': 0.*other slots"):
        shardopt.load_checkpoint(tmp_path / "b", model, opt)
    with pytest.raises(ValueError, match="centered=True, here it is False"):
        shardopt.load_checkpoint(tmp_path / "c", *sgds(shardopt.RMSprop))
    check_equal(contents(model, opt), before)


@pytest.mark.parametrize(
    ("theirs", "ours", "decay", "words"),
    [
        ("Adam", "AdamW", 0.1, ["coupled (l2), here it is decoupled"]),
        ("AdamW", "Adam", 0.1, ["decoupled, here it is coupled (l2)"]),
        ("SGD", "SGD", 0.1, ["coupled (l2), here it is decoupled"]),
        ("Adam", "AdamW", 0.0, []),
        ("Adam", "Adam", 0.1, []),
    ],
)
def test_another_kind_of_weight_decay_warns_once(tmp_path, theirs, ours, decay, words):
    """Kills: the number of a coupled decay used for a decoupled one in silence; a warning for the same kind."""
    dcp.save(tree(*sgds(getattr(torch.optim, theirs), 1, weight_decay=decay)), checkpoint_id=tmp_path)
    options = {"addons": ["decay"]} if ours == "SGD" else {}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        shardopt.load_checkpoint(tmp_path, *sgds(getattr(shardopt, ours), **options))
    said = [str(w.message) for w in told if "weight_decay" in str(w.message)]
    assert len(said) == len(words) and all(word in text for word, text in zip(words, said))


# --- stock DCP alone


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@pytest.mark.parametrize("asynchronous", [False, True], ids=["save", "async_save"])
@pytest.mark.parametrize("state", ["fp32", "int8+log8", "sqrt8+factored"])
def test_stock_dcp_resumes_bitwise(tmp_path, monkeypatch, state, asynchronous, flat):
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    model, opt = job(state, BF16, 3, "stochastic")
    saved = {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt, options=options)}
    if asynchronous:
        future = dcp.async_save(saved, checkpoint_id=tmp_path)
    else:
        dcp.save(saved, checkpoint_id=tmp_path)
    train(model, opt, 3, 6)
    if asynchronous:
        future.result()
    other, target = job(state, BF16, 0, "stochastic")
    with monkeypatch.context() as patch:
        patch.setattr(ShardedOptimizer, "step", lambda *args, **kw: pytest.fail("state had to be initialised"))
        loaded = {
            "model": get_model_state_dict(other),
            "optim": get_optimizer_state_dict(other, target, options=options),
        }
        dcp.load(loaded, checkpoint_id=tmp_path)
        set_model_state_dict(other, loaded["model"])
        set_optimizer_state_dict(other, target, loaded["optim"], options=options)
    train(other, target, 3, 6)
    check_equal(contents(other, target), contents(model, opt))


def test_an_initialisation_step_leaves_no_trace(tmp_path):
    """What DCP and torchtitan do to make state: zero gradients, lr 0, one step."""
    model, opt = job("int8+log8", BF16, 0, "stochastic")
    rates = [group["lr"] for group in opt.param_groups]
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    for group in opt.param_groups:
        group["lr"] = 0.0
    opt.step()
    for group, lr in zip(opt.param_groups, rates):
        group["lr"] = lr
    opt.zero_grad()
    train(model, opt, 0, 3)
    check_equal(contents(model, opt), uninterrupted("int8+log8", BF16, 3))


def test_no_codec_stock_loads_into_another(tmp_path):
    for old in STATES:
        dcp.save(tree(*job(old, FP32, 1)), checkpoint_id=tmp_path / old)
    for old, new in product(STATES, STATES):
        state = tree(*job(new))
        if old == new:
            dcp.load(state, checkpoint_id=tmp_path / old)
        else:
            with pytest.raises(dcp.api.CheckpointException, match=r"Missing key|Size mismatch"):
                dcp.load(state, checkpoint_id=tmp_path / old)
