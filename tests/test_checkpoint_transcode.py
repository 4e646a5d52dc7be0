"""Any codec into any codec, on every mesh, with one bucket of extra memory."""

import weakref
from itertools import product

import pytest
import torch
from torch import nn

import shardopt
from shardopt.codecs.noise import draw, stream_of
from shardopt.dtensor import transcode
from shardopt.rules import Lion
from tests.checkpoint_kit import BF16, FP32, answered, decoded, job, stored_parts
from tests.resume_job import (
    check_equal,
    contents,
    numbers,
    resume,
    run_and_save,
    train,
)
from tests.table import STATES
from tests.threaded import run_threaded

# --- transcoding


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
