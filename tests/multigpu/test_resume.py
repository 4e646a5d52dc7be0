"""Real processes: saves beside training's collectives, asynchronous saves under FSDP2, and resuming on other ranks."""

import os
import sys
import time
import traceback
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import shardopt
from shardopt.dtensor.channel import channel
from tests.resume_job import build, check_equal, contents, optimizer, resume, train, uninterrupted

pytestmark = pytest.mark.multigpu
BF16 = torch.bfloat16
SAVES = 200
STATES = ("fp32", "int8+log8", "sqrt8+factored", "int4+log4")


def begin(rank: int, world_size: int, port_file: str, body: str, folder: str) -> None:
    """One rank: its process group, its work, and an error in a file where it failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=world_size)
    try:
        globals()[body](rank, world_size, Path(folder))
        dist.barrier()
    except BaseException:
        Path(f"{port_file}.{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    dist.destroy_process_group()


def spawn(world_size: int, body, folder: Path, timeout: float = 240) -> None:
    """Run body(rank, world_size, folder) in processes; raises what any rank raised."""
    port_file = folder / f"{body.__name__}{world_size}"
    context = mp.get_context("spawn")
    arguments = [(rank, world_size, str(port_file), body.__name__, str(folder)) for rank in range(world_size)]
    processes = [context.Process(target=begin, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    for process in processes:
        process.kill()
    errors = "\n".join(path.read_text() for path in folder.glob("*.error"))
    assert not errors, errors
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


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
    spawn(2, many_saves, tmp_path)


def test_four_ranks_save_and_three_resume(tmp_path):
    spawn(4, save_all, tmp_path)
    spawn(3, load_all, tmp_path)
