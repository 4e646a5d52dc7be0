"""Committed or nothing, damaged ones refused, the directory clean after a crash."""

import json
import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest

import shardopt
from shardopt.dtensor import manifest, writer
from tests.checkpoint_kit import BF16, FP32, damage, job, three
from tests.resume_job import (
    check_equal,
    contents,
    resume,
    run_and_save,
    uninterrupted,
)
from tests.threaded import run_threaded

# --- commit, damage, cleaning


@pytest.mark.parametrize("how", ["truncated", "flipped", "gone"])
@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "manifest.json", "COMMITTED"])
def test_damage_is_refused_and_the_checkpoint_before_is_used(tmp_path, name, how):
    kept = three(tmp_path)
    damage(tmp_path / "step_00000003" / name, how)
    model, opt = job()
    if (name, how) == ("COMMITTED", "gone"):  # a save that never ended
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
        assert not (tmp_path / "step_00000003").exists()
    else:
        before = contents(model, opt)
        with pytest.raises(ValueError, match=f"step_00000003.*{name}"):
            shardopt.load_checkpoint(tmp_path, model, opt, step=3)
        with pytest.raises(ValueError, match=name):
            shardopt.load_checkpoint(tmp_path / "step_00000003", model, opt)
        check_equal(contents(model, opt), before)
        with pytest.warns(UserWarning, match=f"step_00000003.*{name}"):
            assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2
    check_equal(contents(model, opt), kept[2])


def test_without_checksums_sizes_are_still_verified(tmp_path):
    three(tmp_path)
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "flipped")
    assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 3
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "truncated")
    with pytest.warns(UserWarning, match="bytes instead of"):
        assert shardopt.load_checkpoint(tmp_path, *job(), verify=False)["step"] == 2


def test_when_all_are_damaged_it_says_so(tmp_path):
    three(tmp_path, keep=2)
    for folder in tmp_path.iterdir():
        damage(folder / "__0_0.distcp", "flipped")
    with (
        pytest.warns(UserWarning),
        pytest.raises(ValueError, match=r"every checkpoint .*/step_00000003.*/step_00000002"),
    ):
        shardopt.load_checkpoint(tmp_path, *job())


def test_what_never_ended_is_removed(tmp_path):
    assert shardopt.load_checkpoint(tmp_path / "nowhere", *job()) is None
    assert shardopt.load_checkpoint(tmp_path, *job()) is None
    three(tmp_path)
    (tmp_path / "step_00000002" / "COMMITTED").unlink()
    (tmp_path / "step_00000009").mkdir()
    (tmp_path / "notes").mkdir()
    assert shardopt.load_checkpoint(tmp_path, *job(), step=1)["step"] == 1
    assert (tmp_path / "step_00000009").exists()
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_00000001", "step_00000003"]
    (tmp_path / "step_00000009").mkdir()
    shardopt.save_checkpoint(tmp_path, *job(), step=4)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_00000001", "step_00000003", "step_00000004"]


def test_the_last_k_are_kept(tmp_path):
    three(tmp_path, keep=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000002", "step_00000003"]
    shardopt.save_checkpoint(tmp_path, *job(), step=1, keep=1)  # resumed from an older step
    assert os.listdir(tmp_path) == ["step_00000001"]


def test_nothing_is_pruned_or_committed_when_a_save_fails(tmp_path, monkeypatch):
    three(tmp_path)
    monkeypatch.setattr(writer.HashedStream, "write", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match=r"step_00000004 could not be saved.*rank 0.*disk full"):
        shardopt.save_checkpoint(tmp_path, *job(), step=4, keep=1)
    for again in (False, True):
        save = shardopt.save_checkpoint(tmp_path, *job(), step=5, keep=1, blocking=False)
        with pytest.raises(ValueError, match=r"step_00000005 could not be saved.*disk full"):
            shardopt.save_checkpoint(tmp_path, *job(), step=6) if again else save.wait()
    monkeypatch.undo()
    with pytest.raises(ValueError, match="disk full"):
        save.wait()
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002", "step_00000003"]


def test_nothing_is_pruned_before_the_commit(tmp_path, monkeypatch):
    three(tmp_path)
    monkeypatch.setattr(manifest, "commit", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(ValueError, match="disk full"):
        shardopt.save_checkpoint(tmp_path, *job(), step=4, keep=1)
    assert list(manifest.committed(tmp_path)) == [1, 2, 3]


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    gate, order = threading.Event(), []
    original = writer.CheckpointWriter.finish

    def slow(self, metadata, results):
        gate.wait(10)
        original(self, metadata, results)
        order.append(self.folder.name)

    monkeypatch.setattr(writer.CheckpointWriter, "finish", slow)
    model, opt = job("int8+log8", FP32, 1)
    first = shardopt.save_checkpoint(tmp_path, model, opt, step=1, blocking=False)
    assert not first.done()
    threading.Timer(0.2, gate.set).start()
    second = shardopt.save_checkpoint(tmp_path, model, opt, step=2, blocking=False)
    assert first.done() and order[:1] == ["step_00000001"]
    assert shardopt.load_checkpoint(tmp_path, model, opt)["step"] == 2  # a load waits too
    assert second.done()


def test_the_same_step_is_replaced(tmp_path):
    shardopt.save_checkpoint(tmp_path, *job(steps=1), step=1, extra={"take": 1})
    shardopt.save_checkpoint(tmp_path, *job(steps=2), step=1, extra={"take": 2})
    model, opt = job()
    assert shardopt.load_checkpoint(tmp_path, model, opt) == {"take": 2, "step": 1}
    check_equal(contents(model, opt), contents(*job(steps=2)))


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_on_one_rank_is_known_to_all(tmp_path, monkeypatch, failing):
    original = writer.CheckpointWriter.write_data

    def write(self, plan, planner):
        if self.rank == failing:
            raise OSError("disk full")
        return original(self, plan, planner)

    monkeypatch.setattr(writer.CheckpointWriter, "write_data", write)

    def body(rank):
        with pytest.raises(ValueError, match=f"rank {failing}.*disk full"):
            run_and_save(tmp_path, "fsdp", 2, "int8+log8", BF16, 1)

    run_threaded(2, body)
    assert not (tmp_path / "step_00000001" / "COMMITTED").exists()


def test_damage_is_found_on_several_ranks(tmp_path):
    for at in (1, 2):
        run_threaded(2, lambda rank, at=at: run_and_save(tmp_path, "fsdp", 2, "int8+log8", BF16, at))
    damage(tmp_path / "step_00000002" / "__1_0.distcp", "flipped")
    with pytest.warns(UserWarning, match="__1_0.distcp is corrupt"):
        results = run_threaded(3, lambda rank: resume(tmp_path, "fsdp", 3, "int8+log8", BF16, 3))
    for got in results:
        check_equal(got, uninterrupted("int8+log8", BF16, 3))


def test_five_kills(tmp_path):
    """The hundred of benchmarks/kill.py, but five."""
    root = Path(__file__).resolve().parent.parent
    command = [sys.executable, "-m", "benchmarks.kill", "--forked", "5", "--torchrun", "0", "--seed", "5"]
    done = subprocess.run([*command, "--out", tmp_path / "kill.json"], cwd=root, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "kill.json").read_text())
    assert told["kills"] == told["damaged_files_refused"] == 5
