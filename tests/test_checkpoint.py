"""Checkpoints: committed or nothing, damaged ones refused, any mesh to any mesh, any codec to any codec, bitwise."""

import json
import os
import subprocess
import sys
import threading
import warnings
import weakref
from itertools import product
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import shardopt
from shardopt import ShardedOptimizer
from shardopt.checkpoint_info import main as info
from shardopt.codecs import Geometry, view_shape
from shardopt.codecs.noise import draw, stream_of
from shardopt.dtensor import checkpoint, manifest, record, transcode, writer
from shardopt.dtensor.channel import channel
from shardopt.rules import Adafactor, Lion
from tests.resume_job import (
    Even,
    Odd,
    build,
    check_equal,
    contents,
    numbers,
    optimizer,
    resume,
    run_and_save,
    train,
    uninterrupted,
)
from tests.table import STATES
from tests.threaded import run_threaded

BF16, FP32 = torch.bfloat16, torch.float32
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


@pytest.fixture(autouse=True)
def settled():
    yield
    channel().pending = None


def job(state="int8+log8", dtype=FP32, steps=0, rounding="nearest", rule=None):
    model = build("alone", dtype=dtype)
    opt = optimizer(model, state, rule, rounding)
    train(model, opt, 0, steps)
    return model, opt


def tree(model, opt):
    return {"model": get_model_state_dict(model), "optim": get_optimizer_state_dict(model, opt)}


# --- resume


@pytest.mark.parametrize("blocking", [True, False], ids=["blocking", "async"])
@pytest.mark.parametrize("state", STATES)
def test_resume_is_bitwise(tmp_path, state, blocking):
    model, opt = job(state, BF16, 3, "stochastic")
    save = shardopt.save_checkpoint(tmp_path, model, opt, step=3, blocking=blocking)
    train(model, opt, 3, 6)  # an asynchronous save holds a copy
    assert save.wait() == tmp_path / "step_00000003"
    check_equal(resume(tmp_path, "alone", 1, state, BF16, 6), contents(model, opt))


@pytest.mark.parametrize("rounding", ["nearest", "kahan"])
def test_other_roundings_resume(tmp_path, rounding):
    run_and_save(tmp_path, "alone", 1, "int8+log8", BF16, 3, rounding=rounding)
    got = resume(tmp_path, "alone", 1, "int8+log8", BF16, 6, rounding=rounding)
    check_equal(got, uninterrupted("int8+log8", BF16, 6, rounding=rounding))


MOVES = {
    "fsdp 4 to 4": ("fsdp", 4, "fsdp", 4),
    "fsdp 4 to 3": ("fsdp", 4, "fsdp", 3),
    "hsdp 2x2 to 3": ("hsdp", 4, "fsdp", 3),
    "fsdp 2 to hsdp 2x2": ("fsdp", 2, "hsdp", 4),
    "tp x fsdp 2x2 to 1": ("tp_fsdp", 4, "alone", 1),
    "1 to tp x fsdp 2x2": ("alone", 1, "tp_fsdp", 4),
}
# every move meets every codec once; every codec has three moves
PAIRS = [(move, state) for i, move in enumerate(MOVES) for j, state in enumerate(STATES) if (i + j) % 2 == 0]


@pytest.mark.parametrize(("move", "state"), PAIRS)
def test_any_mesh_to_any_mesh(tmp_path, move, state):
    before, ranks_before, after, ranks_after = MOVES[move]
    model = Even if "tp" in move else None
    save = (tmp_path, before, ranks_before, state, BF16, 3)
    load = (tmp_path, after, ranks_after, state, BF16, 6)
    if ranks_before == 1:
        run_and_save(*save, model=model)
    else:
        run_threaded(ranks_before, lambda rank: run_and_save(*save, model=model))
    if ranks_after == 1:
        results = [resume(*load, model=model)]
    else:
        results = run_threaded(ranks_after, lambda rank: resume(*load, model=model))
    want = uninterrupted(state, BF16, 6, "tp_fsdp" if model else "alone")
    for got in results:
        check_equal(got, want, asks="factored" in state)


def test_a_rule_that_asks_moves(tmp_path):
    rule = Adafactor(lr=3e-2, beta1=0.86)
    options = {"rule": rule, "rounding": "nearest"}
    run_threaded(4, lambda rank: run_and_save(tmp_path, "fsdp", 4, "sqrt8+factored", FP32, 3, **options))
    for got in run_threaded(3, lambda rank: resume(tmp_path, "fsdp", 3, "sqrt8+factored", FP32, 6, **options)):
        check_equal(got, uninterrupted("sqrt8+factored", FP32, 6, **options), asks=True)


def test_saves_after_an_evaluation(tmp_path):
    """A forward without a backward leaves FSDP2's parameters gathered."""

    def body(rank):
        model = build("fsdp", 2, model=Even, dtype=FP32)
        opt = optimizer(model, "int8+log8", rounding="nearest")
        train(model, opt, 0, 2)
        for do in (shardopt.save_checkpoint, shardopt.load_checkpoint):
            with torch.no_grad():
                model(torch.ones(2, 64))
            do(tmp_path, model, opt, step=2)
        train(model, opt, 2, 4)
        return contents(model, opt)

    for got in run_threaded(2, body):
        check_equal(got, uninterrupted("int8+log8", FP32, 4, "tp_fsdp", rounding="nearest"))


# --- transcoding


def answered(asking):
    """Runs a generator whose asker has the whole tensor: means are all that is asked."""
    reply = None
    while True:
        try:
            asked = asking.send(reply)
        except StopIteration as stop:
            return stop.value
        group = asked if type(asked) is tuple else (asked,)
        reply = tuple(ask.x.mean(ask.dim, dtype=torch.float64).float() for ask in group)
        reply = reply if type(asked) is tuple else reply[0]


def stored_parts(opt, p, slot):
    """(codec, parts in the view, geometry) of an unsharded slot."""
    view, geo = view_shape(tuple(p.shape)), Geometry.whole(tuple(p.shape))
    codec = opt.recipes[0].codecs(view, p.dtype)[slot]
    parts = {part.suffix: opt.state[p][".".join(filter(None, (slot, part.suffix)))] for part in codec.parts(view)}
    return codec, {suffix: x.reshape(view) if x.shape == p.shape else x for suffix, x in parts.items()}, geo


def decoded(opt, p, slot):
    codec, parts, geo = stored_parts(opt, p, slot)
    return answered(codec.read(parts, geo))


@pytest.mark.parametrize(("old", "new"), [(a, b) for a, b in product(STATES, STATES) if a != b])
def test_any_codec_to_any_codec(tmp_path, old, new):
    """The new parts are the new codec's of the old one's value, with the noise of the saved key and step."""
    model, opt = job(old, BF16, 3, "stochastic")
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    other, target = job(new, BF16, 0, "stochastic")
    for p in other.parameters():
        target.state[p]["key"] += 1
    assert shardopt.load_checkpoint(tmp_path, other, target)["step"] == 3
    for p, q in zip(model.parameters(), other.parameters()):
        assert torch.equal(p, q)
        assert all(torch.equal(opt.state[p][name], target.state[q][name]) for name in ("step", "key"))
        for slot in ("exp_avg", "exp_avg_sq"):
            codec, got, geo = stored_parts(target, q, slot)
            key, step = opt.state[p]["key"], opt.state[p]["step"]
            value = decoded(opt, p, slot)
            want = answered(
                codec.encode(
                    value, geo, lambda key=key, step=step, slot=slot, geo=geo: draw(key, step, stream_of(slot), geo)
                )
            )
            for suffix, x in want.items():
                assert torch.equal(x.reshape(got[suffix].shape), got[suffix]), (slot, suffix, tuple(p.shape))
    train(other, target, 3, 4)


@pytest.mark.parametrize(("old", "new"), [("fp32", "int8+log8"), ("int4+log4", "fp32"), ("sqrt8+factored", "dyn8")])
def test_transcoding_is_the_same_on_every_mesh(tmp_path, old, new):
    run_threaded(2, lambda rank: run_and_save(tmp_path, "fsdp", 2, old, FP32, 3))
    want = resume(tmp_path, "alone", 1, new, FP32, 4)
    for got in run_threaded(3, lambda rank: resume(tmp_path, "fsdp", 3, new, FP32, 4)):
        check_equal(got, want, asks="factored" in old)


def test_a_format_that_cannot_be_cut_here_is_read_whole(tmp_path):
    """int4 packs two columns a byte; a column shard of odd width cannot hold it, and int8 can."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    class Wide(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(0.1 * numbers("w", (64, 66), -1))

    def options(state):
        return {"exp_avg": state[0], "exp_avg_sq": state[1]}

    model = Wide()
    opt = shardopt.AdamW(model.parameters(), state=options(("int4", "log4")))
    train(model, opt, 0, 3)
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    alone = Wide()
    want = shardopt.AdamW(alone.parameters(), state="bf16")
    shardopt.load_checkpoint(tmp_path, alone, want)

    def on_columns(rank):
        cut = Wide()
        mesh = init_device_mesh("cpu", (2,))
        cut.w = nn.Parameter(distribute_tensor(cut.w.detach(), mesh, [Shard(1)]))
        got = shardopt.AdamW(cut.parameters(), state="bf16")
        shardopt.load_checkpoint(tmp_path, cut, got)
        return contents(cut, got)

    for got in run_threaded(2, on_columns):
        check_equal(got, contents(alone, want))


@pytest.mark.parametrize("elements", [1, 10000, 1 << 30])
def test_memory_of_transcoding_is_one_bucket(tmp_path, monkeypatch, elements):
    model, opt = job("fp32", FP32, 2)
    shardopt.save_checkpoint(tmp_path, model, opt, step=2)
    alive, peak = weakref.WeakValueDictionary(), [0]
    original = transcode.old_parts

    def counted(task):
        parts = original(task)
        if task.device.type != "meta":
            alive.update({len(alive) + id(part): part for part in parts.values()})
            peak[0] = max(peak[0], sum(part.numel() for part in alive.values()))
        return parts

    monkeypatch.setattr(transcode, "old_parts", counted)
    monkeypatch.setattr(transcode, "BUCKET_ELEMENTS", elements)
    other, target = job("int8+log8")
    shardopt.load_checkpoint(tmp_path, other, target)
    big = [p.numel() for p in model.parameters() if p.ndim > 1]
    assert peak[0] <= max(elements, max(big))
    assert peak[0] == 2 * sum(big) if elements == 1 << 30 else peak[0] > 0
    assert not alive


def test_another_rule_is_refused_with_both_recipes(tmp_path):
    model, opt = job("fp32", FP32, 2)
    shardopt.save_checkpoint(tmp_path, model, opt, step=2)
    other, target = job("fp32", rule=Lion(lr=1e-3))
    before = contents(other, target)
    with pytest.raises(ValueError, match=r"adamw/fp32,fp32/decay/nearest.*lion/fp32/decay/nearest"):
        shardopt.load_checkpoint(tmp_path, other, target)
    check_equal(contents(other, target), before)


def test_other_addons_and_rounding_load(tmp_path):
    model, opt = job("int8+log8", BF16, 3, "nearest")
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    other, target = job("int8+log8", BF16, 0, "kahan")
    shardopt.load_checkpoint(tmp_path, other, target)
    for p, q in zip(model.parameters(), other.parameters()):
        shared = {name: value for name, value in opt.state[p].items() if name != "key"}
        assert all(torch.equal(value, target.state[q][name]) for name, value in shared.items())
        assert not target.state[q]["kahan.compensation" + (".bf16" if p.numel() >= 4096 else "")].any()


# --- foreign checkpoints


def torchs(steps=0, flat=False):
    model = build("alone", dtype=FP32)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.83, 0.957), weight_decay=0.1)
    train(model, opt, 0, steps)
    return model, opt


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
    with pytest.raises(ValueError, match=r"exp_avg_sq.*lion/fp32.*another optimizer"):
        shardopt.load_checkpoint(tmp_path, *job("fp32", rule=Lion()))
    with pytest.raises(ValueError, match=r"'optimizer'.*model, optim.*optim_key"):
        shardopt.load_checkpoint(tmp_path, *job("fp32"), optim_key="optimizer")
    with pytest.raises(ValueError, match=r"'net'.*model, optim.*model_key"):
        shardopt.load_checkpoint(tmp_path, *job("fp32"), model_key="net")


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


# --- commit, damage, cleaning


def three(path, **options):
    model, opt = job()
    kept = {}
    for step in (1, 2, 3):
        train(model, opt, step - 1, step)
        shardopt.save_checkpoint(path, model, opt, step=step, **options)
        kept[step] = contents(model, opt)
    return kept


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 2] ^= 4
    path.unlink() if how == "gone" else path.write_bytes(content)


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json", "COMMITTED"])
def test_damage_is_refused_and_the_checkpoint_before_is_used(tmp_path, name, how):
    kept = three(tmp_path)
    damage(tmp_path / "step_00000003" / name, how)
    model, opt = job()
    if (name, how) == ("COMMITTED", "gone"):  # a save that never ended
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
        assert not (tmp_path / "step_00000003").exists()
    else:
        before = contents(model, opt)
        with pytest.raises(ValueError, match=f"step_00000003.*{name}"):
            shardopt.load_checkpoint(tmp_path, model, opt, step=3)
        with pytest.raises(ValueError, match=name):
            shardopt.load_checkpoint(tmp_path / "step_00000003", model, opt)
        check_equal(contents(model, opt), before)
        with pytest.warns(UserWarning, match=f"step_00000003.*{name}"):
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
    check_equal(contents(model, opt), kept[2])


def test_without_checksums_sizes_are_still_verified(tmp_path):
    three(tmp_path)
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "flipped")
    assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 3
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "truncated")
    with pytest.warns(UserWarning, match="bytes instead of"):
        assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 2


def test_when_all_are_damaged_it_says_so(tmp_path):
    three(tmp_path, keep=2)
    for folder in tmp_path.iterdir():
        damage(folder / "__0_0.distcp", "flipped")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"every checkpoint .*/step_00000003.*/step_00000002"),
    ):
        shardopt.load_checkpoint(tmp_path, *job())


def test_what_never_ended_is_removed(tmp_path):
    assert shardopt.load_checkpoint(tmp_path / "nowhere", *job()) is None
    assert shardopt.load_checkpoint(tmp_path, *job()) is None
    three(tmp_path)
    (tmp_path / "step_00000002" / "COMMITTED").unlink()
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "notes").mkdir()
    assert shardopt.load_checkpoint(tmp_path, *job(), step=1)["step"] == 1
    assert (tmp_path / "step_00000009").exists()
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_00000001", "step_00000003"]
    (tmp_path / "step_00000009").mkdir()
    shardopt.save_checkpoint(tmp_path, *job(), step=4)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_00000001", "step_00000003", "step_00000004"]


def test_the_last_k_are_kept(tmp_path):
    three(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]
    shardopt.save_checkpoint(tmp_path, *job(), step=1, keep=1)  # resumed from an older step
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_nothing_is_pruned_or_committed_when_a_save_fails(tmp_path, monkeypatch):
    three(tmp_path)
    monkeypatch.setattr(writer.HashedStream, "write", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"step_00000004 could not be saved.*rank 0.*disk full"):
        shardopt.save_checkpoint(tmp_path, *job(), step=4, keep=1)
    for again in (False, True):
        save = shardopt.save_checkpoint(tmp_path, *job(), step=5, keep=1, blocking=False)
        with pytest.raises(ValueError, match=r"step_00000005 could not be saved.*disk full"):
            shardopt.save_checkpoint(tmp_path, *job(), step=6) if again else save.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="disk full"):
        save.wait()
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002", "step_00000003"]


def test_nothing_is_pruned_before_the_commit(tmp_path, monkeypatch):
    three(tmp_path)
    monkeypatch.setattr(manifest, "commit", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="disk full"):
        shardopt.save_checkpoint(tmp_path, *job(), step=4, keep=1)
    assert list(manifest.committed(tmp_path)) == [1, 2, 3]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    original = writer.CheckpointWriter.finish

    def slow(self, metadata, results):
        gate.wait(10)
        original(self, metadata, results)
        order.append(self.folder.name)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", slow)
    model, opt = job("int8+log8", FP32, 1)
    first = shardopt.save_checkpoint(tmp_path, model, opt, step=1, blocking=False)
    assert not first.done()
    threading.Timer(0.2, gate.set).start()
    second = shardopt.save_checkpoint(tmp_path, model, opt, step=2, blocking=False)
    assert first.done() and order[:1] == ["step_00000001"]
    assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2  # a load waits too
    assert second.done()


def test_the_same_step_is_replaced(tmp_path):
    shardopt.save_checkpoint(tmp_path, *job(steps=1), step=1, extra={"take": 1})
    shardopt.save_checkpoint(tmp_path, *job(steps=2), step=1, extra={"take": 2})
    model, opt = job()
    assert shardopt.load_checkpoint(tmp_path, model, opt) == {"take": 2, "step": 1}
    check_equal(contents(model, opt), contents(*job(steps=2)))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_rank_is_known_to_all(tmp_path, monkeypatch, failing):
    original = writer.CheckpointWriter.write_data

    def write(self, plan, planner):
        if self.rank == failing:
            raise OSError("disk full")
        return original(self, plan, planner)

    monkeypatch.setattr(writer.CheckpointWriter, "write_data", write)

    def body(rank):
        with pytest.raises(ValueError, match=f"rank {failing}.*disk full"):
            run_and_save(tmp_path, "fsdp", 2, "int8+log8", BF16, 1)

    run_threaded(2, body)
    assert not (tmp_path / "step_00000001" / "COMMITTED").exists()


def test_damage_is_found_on_several_ranks(tmp_path):
    for at in (1, 2):
        run_threaded(2, lambda rank, at=at: run_and_save(tmp_path, "fsdp", 2, "int8+log8", BF16, at))
    damage(tmp_path / "step_00000002" / "__1_0.distcp", "flipped")
    with pytest.warns(UserWarning, match="__1_0.distcp is corrupt"):
        results = run_threaded(3, lambda rank: resume(tmp_path, "fsdp", 3, "int8+log8", BF16, 3))
    for got in results:
        check_equal(got, uninterrupted("int8+log8", BF16, 3))


def test_five_kills(tmp_path):
    """The hundred of benchmarks/kill.py, but five."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.kill", "--forked", "5", "--torchrun", "0", "--seed", "5"]
    done = subprocess.run([*command, "--out", tmp_path / "kill.json"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "kill.json").read_text())
    assert told["kills"] == told["damaged_files_refused"] == 5


# --- what does not match, and what may


def test_bad_arguments(tmp_path):
    model, opt = job()
    for options, words in (
        ({"step": -1}, "at least 0"),
        ({"step": "7"}, "integer"),
        ({"step": True}, "integer"),
        ({"step": 1, "keep": 0}, "at least 1"),
        ({"step": 1, "extra": {"x": torch.ones(1)}}, "JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            shardopt.save_checkpoint(tmp_path, model, opt, **options)
    for options, words in (
        ({"step": "last"}, "'latest' or an integer"),
        ({"step": 3}, "no checkpoint of step 3.*none"),
    ):
        with pytest.raises(ValueError, match=words):
            shardopt.load_checkpoint(tmp_path, model, opt, **options)
    with pytest.raises(ValueError, match="has not"):
        shardopt.save_checkpoint(tmp_path, nn.Linear(2, 2), opt, step=1)
    with torch.device("meta"):
        meta = Odd()
    with pytest.raises(ValueError, match="after to_empty"):
        shardopt.save_checkpoint(tmp_path, meta, shardopt.AdamW(meta.parameters()), step=1)
    shardopt.save_checkpoint(tmp_path, model, opt, step=1)
    with pytest.raises(ValueError, match="after to_empty"):
        shardopt.load_checkpoint(tmp_path, meta, shardopt.AdamW(meta.parameters()))


class Grown(Odd):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 64)


def test_missing_parameters_start_fresh_with_one_warning(tmp_path):
    model, opt = job("int8+log8", FP32, 3)
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    other = build("alone", dtype=FP32, model=Grown)
    target = optimizer(other, "int8+log8")
    train(other, target, 10, 12)  # what it has of the head is not a fresh state
    weight = other.head.weight.clone()
    with pytest.warns(UserWarning) as told:
        shardopt.load_checkpoint(tmp_path, other, target)
    (message,) = [str(w.message) for w in told if "lacks" in str(w.message)]
    assert "head.weight (the model's)" in message and "head.bias (its optimizer state)" in message
    assert torch.equal(other.head.weight, weight)
    state = target.state[other.head.weight]
    assert all(not x.any() for name, x in state.items() if name != "key")
    assert torch.equal(target.state[other.tall]["exp_avg.int8"], opt.state[model.tall]["exp_avg.int8"])


def test_another_shape_is_refused(tmp_path):
    class Other(Odd):
        def __init__(self):
            super().__init__()
            self.tall = nn.Parameter(torch.zeros(71, 130))

    shardopt.save_checkpoint(tmp_path, *job(), step=0)
    model = Other()
    with pytest.raises(ValueError, match=r"tall has shape \(70, 130\).*\(71, 130\)"):
        shardopt.load_checkpoint(tmp_path, model, shardopt.AdamW(model.parameters()))


def test_groups_frozen_and_tied_parameters(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 80), nn.Linear(80, 64, bias=False)
            self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.tensor(3))

    def make():
        model = Tied()
        with torch.no_grad():
            model.embed.weight.copy_(numbers("embed", (64, 80), -1))
        lr = torch.tensor(3e-3)
        groups = [{"params": [model.embed.weight], "lr": lr}, {"params": [model.frozen], "lr": 1e-4, "note": "mine"}]
        return model, shardopt.AdamW(groups, betas=(0.5, 0.9))

    model, opt = make()
    model.embed.weight.grad = numbers("embed", (64, 80), 1)
    opt.step()
    opt.param_groups[0]["lr"].fill_(7e-3)
    opt.param_groups[1].update(lr=2e-4, initial_lr=1.0)
    model.count += 1
    shardopt.save_checkpoint(tmp_path, model, opt, step=1)
    other, target = make()
    rate = target.param_groups[0]["lr"]
    shardopt.load_checkpoint(tmp_path, other, target)
    assert target.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(7e-3)
    second = target.param_groups[1]
    assert (second["lr"], second["initial_lr"], second["note"], second["betas"]) == (2e-4, 1.0, "mine", (0.5, 0.9))
    assert other.count == 4 and other.head.weight is other.embed.weight
    for model_, opt_ in ((model, opt), (other, target)):
        model_.embed.weight.grad = numbers("embed", (64, 80), 2)
        opt_.step()
    assert torch.equal(model.embed.weight, other.embed.weight)


def test_loading_keeps_storages(tmp_path):
    model, opt = job("int8+log8", BF16, 2)
    shardopt.save_checkpoint(tmp_path, model, opt, step=2)
    for state in ("int8+log8", "fp32"):
        other, target = job(state, BF16)
        places = {id(x): x.data_ptr() for p in other.parameters() for x in (p, *target.state[p].values())}
        shardopt.load_checkpoint(tmp_path, other, target)
        assert places == {id(x): x.data_ptr() for p in other.parameters() for x in (p, *target.state[p].values())}


# --- what it tells


def test_the_manifest_and_the_command(tmp_path, capsys):
    model, opt = job("int8+log8", BF16, 2, "stochastic")
    folder = shardopt.save_checkpoint(tmp_path, model, opt, step=2, extra={"tokens": 7}).wait()
    told = json.loads((folder / "manifest.json").read_text())
    assert told["format"] == 1 and told["extra"] == {"tokens": 7}
    assert told["recipes"][0]["key"] == "adamw/int8,log8/decay/stochastic"
    assert told["parameters"]["tall"]["slots"] == {"exp_avg": "int8", "exp_avg_sq": "log8"}
    assert told["parameters"]["vector"]["slots"] == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    assert set(told["files"]) == {"__0_0.distcp", ".metadata"}
    for path in (tmp_path, folder):
        assert info([str(path), "--verify"]) == 0
        out = capsys.readouterr().out
        for words in ("adamw/int8,log8/decay/stochastic", "exp_avg_sq.log8", "uint8", "tall", "B/param", "tokens"):
            assert words in out
    damage(folder / "__0_0.distcp", "flipped")
    assert info([str(folder), "--verify"]) == 1
    assert "__0_0.distcp is corrupt" in capsys.readouterr().err
    assert info([str(tmp_path / "none")]) == 2
    dcp.save(tree(*torchs(1)), checkpoint_id=tmp_path / "foreign")
    assert info([str(tmp_path / "foreign")]) == 0
    assert "exp_avg_sq" in capsys.readouterr().out


def test_versions_to_come_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FORMAT", 99)
    shardopt.save_checkpoint(tmp_path, *job(), step=1)
    with pytest.raises(ValueError, match=r"format 99.*install"):
        shardopt.load_checkpoint(tmp_path, *job())


def test_large_checkpoints_are_not_hashed_again_unless_asked(tmp_path, monkeypatch):
    three(tmp_path)
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "flipped")
    monkeypatch.setattr(checkpoint, "VERIFIED_BYTES", 1)
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    with pytest.warns(UserWarning, match="corrupt"):
        assert shardopt.load_checkpoint(tmp_path, *job(), verify=True)["step"] == 2
