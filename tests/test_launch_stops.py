"""The pretraining job from its first minutes on: what it says of checkpoints, when it saves, how it ends on SIGTERM."""

import dataclasses
import os
import signal
import subprocess
import time
from threading import Timer

import pytest

from launch import runlog, runs
from launch.checkpoints import Checkpoints, another
from launch.config import Config
from tests.test_launch import TINY

OPTIONS = [*TINY, "--eval-every=0", "--plot=false", "--sample=0", "--checkpoint-every=1000"]


def checkpoints(**options):
    return Checkpoints(Config(**options), None, None, None)  # type: ignore[arg-type]


def due(**options):
    """The updates of the first 40 after which a run saves."""
    made = checkpoints(**options)
    return [step for step in range(1, 41) if made.due(step)]


def test_a_run_saves_soon_and_then_in_every_period():
    """Kills: a first save that comes in addition to earlier ones, one where none is wanted, one of another period."""
    assert due() == due(checkpoint_every=1000) == [10]
    assert due(checkpoint_every=15) == [10, 15, 30]
    assert due(checkpoint_every=4) == list(range(4, 41, 4)) and due(checkpoint_every=10) == [10, 20, 30, 40]
    assert due(first_checkpoint=3) == [3] and due(first_checkpoint=0) == due(checkpoint_every=0) == []


def test_a_run_says_from_where_it_goes_on(tmp_path):
    made = checkpoints(out=str(tmp_path))
    assert made.told() == f"no complete checkpoint in {tmp_path}/checkpoints: this run begins anew"
    made.saved = 40
    assert made.told() == f"going on from {tmp_path}/checkpoints/step_00000040"


def test_a_folder_has_one_run_at_a_time(tmp_path, capsys):
    """Kills: two runs that write one log and one series of checkpoints; a lock that outlives its run, or is given up
    before the killed ranks are gone."""
    held = runlog.claim(tmp_path)
    with pytest.raises(ValueError, match=rf"another run is at work in .* \(process {os.getpid()} on"):
        runlog.claim(tmp_path, patience=0.3)
    assert capsys.readouterr().out.count("waiting for another run to leave") == 1
    Timer(0.3, held.close).start()
    runlog.claim(tmp_path, patience=60).close()


def test_a_run_goes_on_from_its_own_checkpoints_alone():
    """Kills: other heads or rotary frequencies, whose weights have the same shapes, or more layers, trained on without
    a word; another order of the data; a refusal of what may change."""

    def extra(corpus="a", **options):
        return {"corpus": corpus, "config": dataclasses.asdict(Config(**options))}

    assert another(extra(), extra(steps=9, lr=0.5, out="x", optimizer="Lion", compute_dtype="bf16")) == ""
    assert another(extra(), extra(heads=2, layers=5)) == "another model (layers: 3 then, 5 now; heads: 4 then, 2 now)"
    assert another(extra(), extra(rope_base=5e5)) == "another model (rope_base: 10000.0 then, 500000.0 now)"
    assert another(extra(), extra("b", seed=1)) == "another data order (seed: 0 then, 1 now; corpus: a then, b now)"


@pytest.mark.multigpu
@pytest.mark.slow
def test_an_early_kill_costs_ten_steps_and_sigterm_none(tmp_path):
    """SIGKILL after the first save, SIGTERM in the run that goes on. Kills: a run that begins anew without a word, a
    first save after a hundred steps, a signal that ends the job without one or without a word."""
    out, text = tmp_path / "run", tmp_path / "run.txt"
    saved = out / "checkpoints"
    marker = saved / "step_00000010" / "COMMITTED"

    def until(words: str, step: int) -> subprocess.Popen[bytes]:
        run = runs.begin(1, *OPTIONS, "--steps=100000", f"--out={out}", output=text)
        while words not in text.read_text() or not marker.exists() or runlog.read(out / "log.jsonl")[-1]["step"] < step:
            assert run.poll() is None, text.read_text()[-4000:]
            time.sleep(0.02)
        return run

    runs.kill(until(f"no complete checkpoint in {saved}: this run begins anew\nstarting at step 0\n", 12))
    first = text.read_text()
    stopped = until(f"going on from {saved}/step_00000010\nresumed after step 10\n", 14)
    os.kill(stopped.pid, signal.SIGTERM)
    assert stopped.wait(timeout=120) == 0
    then = text.read_text()[len(first) :]
    last = runlog.read(out / "log.jsonl")[-1]["step"]
    told = f"stopped by a signal after step {last}: saved in {saved}/step_{last:08d}, the same command goes on there"
    assert told in then and (saved / f"step_{last:08d}" / "COMMITTED").exists() and last > 10
