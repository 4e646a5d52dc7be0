"""Resume is bitwise, on the same mesh and on any other."""

import pytest
import torch

import shardopt
from shardopt.rules import Adafactor
from tests.checkpoint_kit import BF16, FP32, job
from tests.resume_job import (
    Even,
    build,
    check_equal,
    contents,
    optimizer,
    resume,
    run_and_save,
    train,
    uninterrupted,
)
from tests.table import STATES
from tests.threaded import run_threaded

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
