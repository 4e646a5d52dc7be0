"""Real processes, alone and as ranks on gloo, forked from one that has imported everything: torch is imported once."""

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

Body = Callable[[int, int, Path], None]


def started(function: Callable[..., None], *given: Any) -> Any:
    """A process that calls function(*given), a function of a module; its environment is that of the first such call,
    its hashes are its own."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["pytest", "shardopt"])  # the server lives as long as this process
    process = multiprocessing.get_context("forkserver").Process(target=function, args=given, daemon=True)
    process.start()
    return process


def run_processes(world_size: int, body: Body, folder: Path, timeout: float = 240) -> None:
    """body(rank, world_size, folder) in processes of one group; AssertionError with the traceback of every rank that
    failed. body: a function of a module, found again by its name."""
    store = folder / f"{body.__name__}{world_size}"
    processes = [started(begin, rank, world_size, store, body) for rank in range(world_size)]
    end = time.monotonic() + timeout
    for process in processes:
        process.join(max(0.1, end - time.monotonic()))
    for process in processes:
        process.kill()
    errors = "\n".join(path.read_text() for path in folder.glob("*.error"))
    assert not errors, errors
    assert all(process.exitcode == 0 for process in processes), [process.exitcode for process in processes]


def begin(rank: int, world_size: int, store: Path, body: Body) -> None:
    """One rank: its process group, its work, and an error in a file where it failed."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world_size)
    try:
        body(rank, world_size, store.parent)
        dist.barrier()
    except BaseException:
        Path(f"{store}.{rank}.error").write_text(traceback.format_exc())
        os._exit(1)
    dist.destroy_process_group()
