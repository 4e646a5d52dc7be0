"""What the checkpoint tests share: jobs, resumes, and what their contents are compared by."""

from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
)

import shardopt
from shardopt.codecs import Geometry, view_shape
from shardopt.dtensor.channel import channel
from tests.resume_job import (
    build,
    contents,
    optimizer,
    train,
)

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


def decoded(opt, p, slot):
    codec, parts, geo = stored_parts(opt, p, slot)
    return answered(codec.read(parts, geo))


def torchs(steps=0, flat=False):
    model = build("alone", dtype=FP32)
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.83, 0.957), weight_decay=0.1)
    train(model, opt, 0, steps)
    return model, opt


def damage(path: Path, how: str) -> None:
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: len(content) // 2]
    elif how == "flipped":
        content[len(content) // 2] ^= 4
    path.unlink() if how == "gone" else path.write_bytes(content)


def three(path, **options):
    model, opt = job()
    kept = {}
    for step in (1, 2, 3):
        train(model, opt, step - 1, step)
        shardopt.save_checkpoint(path, model, opt, step=step, **options)
        kept[step] = contents(model, opt)
    return kept


def stored_parts(opt, p, slot):
    """(codec, parts in the view, geometry) of an unsharded slot."""
    view, geo = view_shape(tuple(p.shape)), Geometry.whole(tuple(p.shape))
    codec = opt.recipes[0].codecs(view, p.dtype)[slot]
    parts = {part.suffix: opt.state[p][".".join(filter(None, (slot, part.suffix)))] for part in codec.parts(view)}
    return codec, {suffix: x.reshape(view) if x.shape == p.shape else x for suffix, x in parts.items()}, geo


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
