"""How well the exchange of whole matrices hides behind the work on them: steps over a simulated link.

    python -m benchmarks.overlap

One rank of a fake group of eight. A message takes 1 ms and a second a gigabyte (or a tenth of it), messages follow one
another on the link, and the rank goes on meanwhile; work on a matrix takes a given time, asleep. What a step does
besides (encode, pack, decode, write) is real. Measured from the first message sent to the last one received. The
bound: the link, or the same over a link that takes no time, whichever lasts longer, and the first message and the last,
which nothing can hide.
"""

import argparse
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from shardopt import Recipe, ShardedOptimizer
from shardopt.asks import Asking, Whole, Wire
from shardopt.dtensor.plan import plan
from shardopt.rules import Rule

RESULT = Path(__file__).parent / "results" / "overlap.json"
RANKS, LATENCY = 8, 1e-3  # seconds
SHAPE, COUNT = (512, 512), 96
WORKS = {"0.2 ms": 0.2e-3, "2 ms": 2e-3, "18 ms": 18e-3}  # seconds a matrix
LINKS = {"1 GB/s": 1e9, "0.1 GB/s": 1e8}  # bytes a second


class Link:
    """Messages travel one after another, or, unless `slow`, in no time. messages: seconds of each on the slow link.

    began, ended: when the first was sent and the last received.
    """

    def __init__(self, bandwidth: float) -> None:
        self.bandwidth, self.wire = bandwidth, ThreadPoolExecutor(1)
        self.messages: list[float] = []
        self.slow, self.began, self.ended = False, 0.0, 0.0

    def send(
        self, arriving: Tensor, leaving: Tensor, sizes: Sequence[int], sent: Sequence[int], group: Any, async_op: bool
    ) -> Any:
        if not self.messages:
            self.began = time.perf_counter()
        self.messages.append(LATENCY + max(arriving.numel(), leaving.numel()) / self.bandwidth)
        return Sent(self, self.wire.submit(time.sleep, self.messages[-1] if self.slow else 0.0))


@dataclass
class Sent:
    """A message on its way."""

    link: Link
    done: Future[None]

    def wait(self) -> None:
        self.done.result()
        self.link.ended = time.perf_counter()


@dataclass(frozen=True, kw_only=True)
class Sleep:
    """A work that takes its time."""

    seconds: float

    def __call__(self, x: Tensor) -> Tensor:
        time.sleep(len(x) * self.seconds)
        return x

    def flops(self, rows: int, cols: int) -> float:
        return 1e9

    def key(self) -> str:
        return "sleep"


@dataclass(frozen=True, kw_only=True)
class Sleeper(Rule):
    """Nothing but a `Whole`."""

    name: ClassVar[str] = "sleeper"
    asks: ClassVar[bool] = True
    numbers: ClassVar[tuple[str, ...]] = ("lr",)
    lr: Any = 1.0
    work: Any = None

    def whole(self, view: tuple[int, ...]) -> tuple[Any, Wire, str]:
        return self.work, Wire(), "full"

    def update(self, p: Tensor, g: Tensor, s: Any, h: Any) -> Asking:
        return (yield Whole(g, *self.whole(h.shape))), h.lr


def timed(optimizer: Any, link: Link, slow: bool) -> float:
    link.slow = slow
    link.messages.clear()
    optimizer.step()
    return link.ended - link.began


def measure(link: Link, mesh: DeviceMesh, seconds: float, bucket_bytes: int, repeats: int) -> dict[str, Any]:
    """Figures of one kind of step: the link and one that takes no time take turns, medians."""
    dist.all_to_all_single = link.send
    ps = []
    for _ in range(COUNT):
        local = torch.zeros(SHAPE[0] // RANKS, SHAPE[1])
        whole = {"run_check": False, "shape": torch.Size(SHAPE), "stride": (SHAPE[1], 1)}
        ps.append(DTensor.from_local(local, mesh, (Shard(0),), **whole).requires_grad_())
        ps[-1].grad = DTensor.from_local(torch.ones_like(local), mesh, (Shard(0),), **whole)
    optimizer = ShardedOptimizer(ps, Recipe(Sleeper(work=Sleep(seconds=seconds))))
    optimizer.answers.planner = partial(plan, bucket_bytes=bucket_bytes)
    optimizer.step()
    taken, free = [], []
    for _ in range(repeats):
        free.append(timed(optimizer, link, slow=False))
        taken.append(timed(optimizer, link, slow=True))
    busy, ends = sum(link.messages), link.messages[0] + link.messages[-1]
    step, work = statistics.median(taken), statistics.median(free)
    return {
        "buckets": len(optimizer.answers.scheduled.buckets),
        "step_ms": round(step * 1e3, 2),
        "link_ms": round(busy * 1e3, 2),
        "work_ms": round(work * 1e3, 2),
        "first_and_last_ms": round(ends * 1e3, 2),
        "one_after_another_ms": round((busy + work) * 1e3, 2),
        "of_bound": round(step / (max(busy, work) + ends), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--bucket-bytes", type=int, default=1 << 22)
    args = parser.parse_args()
    dist.init_process_group("fake", rank=1, world_size=RANKS, store=FakeStore())
    mesh = init_device_mesh("cpu", (RANKS,))
    steps = {
        f"{kind}, {name}": measure(Link(bandwidth), mesh, seconds, args.bucket_bytes, args.repeats)
        for name, bandwidth in LINKS.items()
        for kind, seconds in WORKS.items()
    }
    setting = {"ranks": RANKS, "shape": SHAPE, "matrices": COUNT, "latency_s": LATENCY}
    RESULT.write_text(json.dumps({**setting, "torch": torch.__version__, "steps": steps}, indent=1) + "\n")
    for name, figures in steps.items():
        print(f"{name:22}", figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
