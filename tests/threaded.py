"""Ranks as threads: a process group inside one process, for FSDP2, HSDP, TP and DCP in milliseconds a test."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed import multi_threaded_pg as threaded

if not hasattr(threaded.ThreadLocalWorld, "comms"):  # torch 2.11 asks for it when it destroys a group
    threaded.ThreadLocalWorld.comms = property(lambda self: [])  # type: ignore[attr-defined]
    torch._C._ensureCUDADeviceGuardSet()  # a CUDA build without a GPU crashes when a thread is the first to do this


def run_threaded(world_size: int, fn: Callable[[int], Any], timeout: float = 120.0) -> list[Any]:
    """fn(rank) on every rank of a process group of `world_size` threads; the results, by rank.

    Random numbers need generators of their own: the default one is shared. Raises the first error that is not the
    consequence of another rank's, with the ranks' tracebacks; TimeoutError where ranks wait for each other for ever.
    """
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()
    threaded.ProcessLocalGroup.reset()
    store = dist.HashStore()
    results: list[Any] = [None] * world_size
    errors: list[tuple[int, BaseException]] = []

    def body(rank: int) -> None:
        dist.init_process_group(backend="threaded", rank=rank, world_size=world_size, store=store)
        try:
            results[rank] = fn(rank)
        except SystemExit:  # how the group ends the ranks that wait for one that failed
            pass
        except BaseException as error:
            errors.append((rank, error))
            threaded.ProcessLocalGroup.exception_handle(error)
        finally:
            dist.destroy_process_group()

    threads = [threading.Thread(target=body, args=(rank,), daemon=True) for rank in range(world_size)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout)
        late = [rank for rank, thread in enumerate(threads) if thread.is_alive()]
        if late:
            threaded.ProcessLocalGroup.exception_handle(TimeoutError())
            for thread in threads:
                thread.join(5)
    finally:
        threaded.ProcessLocalGroup.reset()
        threaded._uninstall_threaded_pg()
        torch._C._distributed_c10d._set_thread_isolation_mode(False)
    if errors:
        rank, error = errors[0]
        told = "".join(traceback.format_exception(error))
        error.add_note(f"on rank {rank} of {world_size}:\n{told}") if hasattr(error, "add_note") else None
        raise error
    if late:
        raise TimeoutError(f"ranks {late} of {world_size} did not end within {timeout} s")
    return results
