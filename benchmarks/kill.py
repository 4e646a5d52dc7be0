"""Kills training jobs at random moments, saves included, and checks that every restart resumes and loses nothing.

    python -m benchmarks.kill --forked 90 --torchrun 10 --out benchmarks/results/kill.json

A forked job (torch is imported once) trains with int8 state and stochastic rounding, saves every other step, blocking
or asynchronously, and is killed by SIGKILL: at a drawn one of its write calls, which is left half done, or after a
drawn time. Then: the newest committed checkpoint is resumed; nothing uncommitted is left; parameters and state are
the uninterrupted run's at that step and at the end, bitwise; and with a random file of the newest checkpoint
truncated or one bit of it flipped, that step is refused, and `latest` warns and takes the one before.

Write calls are drawn in two ways: uniformly over all calls that write tensors, which are thousands, and uniformly
over the few that commit (manifest, marker, removals).
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import shardopt
from benchmarks.kill_torchrun import kill_torchrun
from shardopt.dtensor import manifest, writer
from tests.resume_job import build, check_equal, contents, optimizer, train

STATE, DTYPE = "int8+log8", torch.bfloat16
STEPS, EVERY, KEEP = 12, 2, 2


# --- dying at a write call


@dataclass
class Doom:
    """Counts moments at which a job can be killed, by kind; at the `last` one of `kind` it is, without a warning."""

    kind: str = ""
    last: int = 0
    data: int = 0
    commit: int = 0

    def moment(self, kind: str) -> None:
        setattr(self, kind, getattr(self, kind) + 1)
        if kind == self.kind and getattr(self, kind) == self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def next_is_last(self, kind: str) -> bool:
        return kind == self.kind and getattr(self, kind) + 1 == self.last


def hook(doom: Doom) -> None:
    """Makes every write a moment before, in the middle (half of it is on disk) and after; removals likewise."""
    write, durable = writer.HashedStream.write, manifest.write_durably

    def torn_write(self: Any, content: Any) -> int:
        doom.moment("data")
        if doom.next_is_last("data"):
            self.stream.write(bytes(memoryview(content).cast("B")[: len(content) // 2]))
            self.stream.flush()
        doom.moment("data")
        return write(self, content)

    def torn_durable(path: Path, content: bytes) -> None:
        doom.moment("commit")
        if doom.next_is_last("commit"):  # the marker is one call that writes all or nothing
            path.write_bytes(b"" if path.name == manifest.COMMITTED else content[: len(content) // 2])
        doom.moment("commit")
        durable(path, content)
        doom.moment("commit")

    def torn_discard(folder: Path) -> None:
        doom.moment("commit")
        (folder / manifest.COMMITTED).unlink(missing_ok=True)
        for file in sorted(folder.iterdir()):
            doom.moment("commit")
            file.unlink()
        doom.moment("commit")
        folder.rmdir()

    writer.HashedStream.write = torn_write  # type: ignore[method-assign]
    manifest.write_durably = torn_durable
    manifest.discard = torn_discard


# --- the job


def work(folder: Path, blocking: bool, reference: Path | None = None) -> int:
    """Resume where there is a checkpoint, train to the end, save on the way; the step it began at.

    With `reference`, compares what was loaded, and the end, with the uninterrupted run's.
    """
    model = build("alone", dtype=DTYPE)
    opt = optimizer(model, STATE)
    extra = shardopt.load_checkpoint(folder, model, opt)
    first = extra["step"] if extra else 0
    if reference and first:
        check_equal(contents(model, opt), torch.load(reference / f"{first}.pt"))
    for step in range(first + 1, STEPS + 1):
        train(model, opt, step - 1, step)
        if step % EVERY == 0:
            shardopt.save_checkpoint(folder, model, opt, step=step, keep=KEEP, blocking=blocking)
    save = shardopt.save_checkpoint(folder, model, opt, step=STEPS + 1, keep=KEEP, blocking=blocking)
    save.wait()
    left = {path.name for path in folder.iterdir()}
    assert left == {path.name for path in manifest.committed(folder).values()}, f"left behind: {left}"
    if reference:
        check_equal(contents(model, opt), torch.load(reference / f"{STEPS}.pt"))
    return first


def keep_reference(folder: Path) -> None:
    """Contents of an uninterrupted run after every step."""
    model = build("alone", dtype=DTYPE)
    opt = optimizer(model, STATE)
    for step in range(1, STEPS + 1):
        train(model, opt, step - 1, step)
        torch.save(contents(model, opt), folder / f"{step}.pt")
    torch.save(contents(model, opt), folder / f"{STEPS + 1}.pt")


def forked(body: Callable[[], Any], result: Path, kill_after: float | None = None) -> tuple[bool, Any]:
    """Run body() in a forked child: (whether it ended by itself, what it returned). Raises what it raised."""
    result.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            result.write_text(json.dumps(["returned", body()]))
            code = 0
        except BaseException:
            result.write_text(json.dumps(["raised", traceback.format_exc()]))
        finally:
            os._exit(code)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    if os.WIFSIGNALED(status):
        return False, None
    kind, value = json.loads(result.read_text())
    if kind == "raised":
        raise AssertionError(value)
    return True, value


def check_damage(folder: Path, reference: Path, how: str, choice: random.Random) -> str:
    """Damage a random file of the newest checkpoint: it is refused by number, and `latest` takes the one before."""
    steps = sorted(manifest.committed(folder))
    newest, before = steps[-1], steps[-2]
    path = choice.choice(sorted(manifest.committed(folder)[newest].iterdir()))
    content = bytearray(path.read_bytes())
    if how == "truncated":
        content = content[: choice.randrange(1, len(content))]
    else:
        content[choice.randrange(len(content))] ^= 1 << choice.randrange(8)
    path.write_bytes(content)
    model = build("alone", dtype=DTYPE)
    opt = optimizer(model, STATE)
    try:
        shardopt.load_checkpoint(folder, model, opt, step=newest)
    except ValueError as error:
        assert path.name in str(error), f"{path} is not named: {error}"
    else:
        raise AssertionError(f"{path} was {how}, and loaded without an error")
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        extra = shardopt.load_checkpoint(folder, model, opt)
    assert extra == {"step": before}, f"{extra} instead of step {before}"
    assert any(path.name in str(warning.message) for warning in told), "no warning named the file"
    check_equal(contents(model, opt), torch.load(reference / f"{before}.pt"))
    return path.name


def kill_forked(count: int, seed: int) -> list[dict[str, Any]]:
    """So many kills of forked jobs, at drawn write calls (2 of 3) or times; `failure` says what one lost."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    choice, kills = random.Random(seed), []
    root = Path(tempfile.mkdtemp(prefix="shardopt_kill_"))
    reference, result, folder = root / "reference", root / "result", root / "run"
    reference.mkdir()
    try:
        forked(lambda: keep_reference(reference), result)
        moments, seconds = {}, {}
        for blocking in (True, False):

            def counted(blocking: bool = blocking) -> dict[str, int]:
                doom = Doom()
                hook(doom)
                work(root / f"whole_{blocking}", blocking)
                return {"data": doom.data, "commit": doom.commit}

            moments[blocking] = forked(counted, result)[1]
            started = time.monotonic()
            forked(lambda blocking=blocking: work(root / f"timed_{blocking}", blocking), result)
            seconds[blocking] = time.monotonic() - started
        for number in range(count):
            blocking = number % 2 == 0
            kind = ("data", "commit", "time")[number // 2 % 3]
            ended = True
            while ended:  # a job that was done before its time is drawn again
                shutil.rmtree(folder, ignore_errors=True)
                doom = Doom(kind, choice.randint(1, moments[blocking].get(kind, 1)))
                after = choice.uniform(0.0, seconds[blocking]) if kind == "time" else None

                def doomed(doom: Doom = doom, blocking: bool = blocking) -> int:
                    hook(doom)
                    return work(folder, blocking)

                ended, _ = forked(doomed, result, after)
            left = sorted(manifest.step_folders(folder))
            committed = sorted(manifest.committed(folder))
            how, drawn = choice.choice(("truncated", "flipped")), random.Random(choice.random())
            first, file, failure = None, None, None
            try:
                _, first = forked(lambda blocking=blocking: work(folder, blocking, reference), result)
                assert first == max(committed, default=0), f"resumed at {first}, committed were {committed}"
                _, file = forked(lambda how=how, drawn=drawn: check_damage(folder, reference, how, drawn), result)
            except AssertionError as error:
                failure = str(error)
            kills.append(
                {
                    "failure": failure,
                    "kind": "blocking" if blocking else "async",
                    "at": f"{after:.3f} s"
                    if after is not None
                    else f"{kind} write {doom.last} of {moments[blocking][kind]}",
                    "found": left,
                    "resumed": first,
                    "during_a_save": left != committed,
                    "damage": f"{file} {how}" if file else None,
                }
            )
    finally:
        shutil.rmtree(root, ignore_errors=True)
    return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--forked", type=int, default=90, help="kills of forked jobs")
    parser.add_argument("--torchrun", type=int, default=10, help="kills of launch/pretrain.py under torchrun")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "kill.json")
    options = parser.parse_args()
    started = time.monotonic()
    kills = kill_forked(options.forked, options.seed) if options.forked else []
    print(f"{len(kills)} forked, {time.monotonic() - started:.0f} s", file=sys.stderr)
    kills += kill_torchrun(options.torchrun, options.seed) if options.torchrun else []
    summary = {
        "kills": len(kills),
        "during_a_save": sum(kill["during_a_save"] for kill in kills),
        "damaged_files_refused": sum(bool(kill.get("damage")) for kill in kills),
        "lost_or_corrupt": sum(kill["failure"] is not None for kill in kills),
        "torch": torch.__version__,
        "seconds": round(time.monotonic() - started),
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps({**summary, "each": kills}, indent=1) + "\n")
    print(json.dumps(summary, indent=1))
    raise SystemExit(summary["lost_or_corrupt"] > 0)


if __name__ == "__main__":
    main()
