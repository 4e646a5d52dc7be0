"""Real processes: saves beside training's collectives, asynchronous saves under FSDP2, and resuming on other ranks."""

import os
import sys
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import shardopt
from shardopt.dtensor.channel import channel
from tests.processes import run_processes
from tests.resume_job import build, check_equal, contents, optimizer, resume, train, uninterrupted

pytestmark = pytest.mark.multigpu
BF16 = torch.bfloat16
SAVES = 200
STATES = ("fp32", "int8+log8", "sqrt8+factored", "int4+log4")


def many_saves(rank: int, world_size: int, folder: Path) -> None:
    """Training's collectives on the default gloo group all the while 200 saves go through theirs."""
    started = time.monotonic()
    model = build("fsdp", world_size, dtype=BF16)
    opt = optimizer(model, "sqrt8+factored")  # asks: its steps have collectives of their own
    reductions, overlapped = 0, 0
    for step in range(1, SAVES + 1):
        if step <= 3 or step % 20 == 0:
            train(model, opt, step - 1, step)
        save = shardopt.save_checkpoint(folder / "many", model, opt, step=step, keep=2, blocking=False)
        while True:
            x = torch.full((1000,), float(rank))
            dist.all_reduce(x)
            assert x[0] == sum(range(world_size))
            reductions += 1
            overlapped += not save.done()
            busy = torch.tensor(float(not save.done()))
            dist.all_reduce(busy)
            if not busy or reductions % 4 == 0:
                break
    channel().settle()
    assert overlapped > SAVES, (overlapped, reductions)
    if rank == 0:
        assert sorted(os.listdir(folder / "many")) == [f"step_{SAVES - 1:08d}", f"step_{SAVES:08d}"]
        told = f"{SAVES} saves beside {2 * reductions} all-reduces, {overlapped} during a save"
        print(f"{told}, {time.monotonic() - started:.1f} s", file=sys.stderr)
    before = contents(model, opt)
    assert shardopt.load_checkpoint(folder / "many", model, opt) == {"step": SAVES}
    check_equal(contents(model, opt), before)


def save_all(rank: int, world_size: int, folder: Path) -> None:
    """FSDP2 and HSDP jobs that save asynchronously, go on at once, and are the uninterrupted run at the end."""
    for state in STATES:
        for layout in ("fsdp", "hsdp"):
            model = build(layout, world_size, dtype=BF16)
            opt = optimizer(model, state)
            train(model, opt, 0, 3)
            save = shardopt.save_checkpoint(folder / layout / state, model, opt, step=3, blocking=False)
            train(model, opt, 3, 5)
            save.wait()
            check_equal(contents(model, opt), uninterrupted(state, BF16, 5), asks="factored" in state)


def load_all(rank: int, world_size: int, folder: Path) -> None:
    for state in STATES:
        for layout in ("fsdp", "hsdp"):
            got = resume(folder / layout / state, "fsdp", world_size, state, BF16, 6)
            check_equal(got, uninterrupted(state, BF16, 6), asks="factored" in state)


def test_training_and_two_hundred_saves_do_not_meet(tmp_path):
    run_processes(2, many_saves, tmp_path)


def test_four_ranks_save_and_three_resume(tmp_path):
    run_processes(4, save_all, tmp_path)
    run_processes(3, load_all, tmp_path)
