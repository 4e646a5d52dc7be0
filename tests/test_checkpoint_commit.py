"""Committed or nothing, the directory clean after a crash."""

import json
import os
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

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


def test_what_never_ended_is_removed(tmp_path):
    assert shardopt.load_checkpoint(tmp_path / "nowhere", *job()) is None
    assert shardopt.load_checkpoint(tmp_path, *job()) is None
    three(tmp_path)
    crashed(tmp_path / "step_00000002")
    manifest.begin(tmp_path / "step_00000009")
    for name in ("notes", "step_00000010.being_made", "step_00000011.being_removed"):
        (tmp_path / name).mkdir()
    with warnings.catch_warnings():  # a save that was cut short is nothing to warn of
        warnings.simplefilter("error", UserWarning)
        assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    shardopt.save_checkpoint(tmp_path, *job(), step=4)
    assert sorted(os.listdir(tmp_path)) == ["notes", "step_00000001", "step_00000003", "step_00000004"]


def crashed(folder):
    (folder / "COMMITTED").rename(folder / "SAVING")


def test_loading_removes_nothing(tmp_path):
    """Kills: cleaning at load, which took the folder from under another job's save and failed on read-only roots; a
    save that never ended taken for a checkpoint of plain DCP."""
    three(tmp_path)
    crashed(tmp_path / "step_00000003")
    before = sorted(tmp_path.rglob("*"))
    for mode in (0o555, 0o755):
        tmp_path.chmod(mode)
        assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 2
        assert sorted(tmp_path.rglob("*")) == before
    for _ in range(2):
        with pytest.raises(ValueError, match="no complete checkpoint"):
            shardopt.load_checkpoint(tmp_path / "step_00000003", *job())
        (tmp_path / "step_00000003" / "manifest.json").unlink(missing_ok=True)


def test_plain_dcp_folders_survive(tmp_path):
    """Kills: cleaning by name, which took step_* folders that plain DCP wrote; and replacing them."""
    dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "step_00000001")
    before = sorted(tmp_path.rglob("*"))
    shardopt.save_checkpoint(tmp_path, *job(), step=2, keep=1)
    with pytest.raises(ValueError, match="not shardopt's to replace"):
        shardopt.save_checkpoint(tmp_path, *job(), step=1)
    assert set(before) < set(tmp_path.rglob("*"))
    assert not (tmp_path / "step_00000002" / "SAVING").exists()


def broken(*args, **options):
    raise OSError("disk full")


BREAKS = {
    "write_data": (writer.CheckpointWriter, "write_data"),
    "finish": (writer.CheckpointWriter, "finish"),
    "commit": (manifest, "commit"),
    "marker": (Path, "replace"),
}


@pytest.mark.parametrize("where", BREAKS)
@pytest.mark.parametrize("blocking", [True, False])
def test_a_failed_save_leaves_the_same_step_as_it_was(tmp_path, monkeypatch, where, blocking):
    """Kills: removing the checkpoint of a step before its successor is committed."""
    shardopt.save_checkpoint(tmp_path, *job(steps=1), step=1, extra={"take": 1})
    monkeypatch.setattr(*BREAKS[where], broken)
    with pytest.raises(ValueError, match="the checkpoints before it are untouched"):
        shardopt.save_checkpoint(tmp_path, *job(), step=1, blocking=blocking).wait()
    assert os.listdir(tmp_path) == ["step_00000001"]
    assert shardopt.load_checkpoint(tmp_path, *job()) == {"take": 1, "step": 1}


@pytest.mark.parametrize("ended", [False, True])
def test_after_a_crash_the_next_save_puts_the_same_step_back(tmp_path, ended):
    """Kills: losing both checkpoints of a step to a crash while the second is written."""
    shardopt.save_checkpoint(tmp_path, *job(), step=1, extra={"take": 1})
    manifest.begin(tmp_path / "step_00000001")
    if ended:  # died between commit and removal
        manifest.commit(tmp_path / "step_00000001", {"format": 1, "extra": {"take": 2}})
    shardopt.save_checkpoint(tmp_path, *job(), step=2)
    assert sorted(os.listdir(tmp_path)) == ["step_00000001", "step_00000002"]
    assert manifest.read_manifest(tmp_path / "step_00000001")["extra"] == {"take": 1 + ended}


@pytest.mark.parametrize(("step", "keep", "what"), [(4, 1, "step_00000002"), (3, None, "step_00000003.being_replaced")])
def test_what_cannot_be_removed_is_a_warning_and_links_are_not_followed(tmp_path, monkeypatch, step, keep, what):
    """Kills: a committed save reported as failed; checkpoints emptied behind a link."""
    three(tmp_path / "far")
    near = tmp_path / "near"
    near.mkdir()
    for link in ("step_00000001", "step_00000002", "step_00000002.being_removed"):
        (near / link).symlink_to(tmp_path / "far" / link[:13])
    shardopt.save_checkpoint(near, *job(), step=3, keep=2)
    shardopt.save_checkpoint(near, *job(), step=2)  # replaces a link
    assert sorted(os.listdir(near)) == ["step_00000002", "step_00000002.being_removed", "step_00000003"]
    assert list(manifest.committed(tmp_path / "far")) == [1, 2, 3]
    monkeypatch.setattr(manifest, "discard", broken)
    with pytest.warns(UserWarning, match=f"{what} could not be removed.*disk full"):
        shardopt.save_checkpoint(near, *job(), step=step, keep=keep)
    assert step in manifest.committed(near)
    with pytest.warns(UserWarning, match=r"being_removed could not be removed.*disk full"):
        shardopt.save_checkpoint(near, *job(), step=5)  # what is stuck fails no later save
    assert 5 in manifest.committed(near)


def test_a_failed_save_that_nobody_waited_for_warns(tmp_path, monkeypatch):
    """Kills: the last asynchronous save of a job failing in silence."""
    gate = threading.Event()
    monkeypatch.setattr(writer.CheckpointWriter, "finish", lambda *args, **options: gate.wait(10) and broken())
    with pytest.warns(UserWarning, match="step_00000001 could not be saved.*disk full"):
        save = shardopt.save_checkpoint(tmp_path, *job(), step=1, blocking=False)
        gate.set()
        while not save.undone:
            time.sleep(0.01)
        time.sleep(0.1)
    with pytest.raises(ValueError, match="disk full"):
        save.wait()


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


@pytest.mark.parametrize("where", ["commit", "marker"])
def test_nothing_is_pruned_before_the_commit(tmp_path, monkeypatch, where):
    """Kills: pruning before `commit`, or inside it before the marker has its name."""
    three(tmp_path)
    monkeypatch.setattr(*BREAKS[where], broken)
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
