"""Kernels come from a compiler and a folder, and either may fail: each failure gives the reference and a sentence."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import shardopt
from shardopt.kernels import cache, cpu, native
from shardopt.kernels.key import key_at
from shardopt.recipe import Recipe
from shardopt.rules import Lion

ROOT = Path(__file__).parents[1]


def key(rounding: str = "nearest"):
    recipe = Recipe(Lion(), rounding=rounding)
    return key_at(recipe, (64, 64), torch.float32, torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this test's own, and nothing remembered of the machine."""

    def forget():
        for remembered in (cache.cache_folder, cpu.compiler, cpu.library, cpu.load):
            remembered.cache_clear()

    monkeypatch.setenv("SHARDOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native, "SAID", set())
    forget()
    yield tmp_path / "cache"
    monkeypatch.undo()
    forget()


def one_step(fused=None):
    p = nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    opt = shardopt.Lion([p], lr=0.1, state="fp32", fused=fused)
    opt.step()
    assert torch.equal(p.detach(), torch.full((64, 64), 0.9))
    return opt


def test_compiled_once_and_found_again(folder):
    """Kills: a name that changes from process to process, a cache that is never read."""
    assert one_step().native.stepped == 1
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert len(made) == 1
    note = json.loads(next(iter(made)).with_suffix(".json").read_text())
    assert note["key"].startswith("lion/fp32") and note["seconds"] > 0 and "Lion" in note["cpp"]
    script = "from tests.test_kernel_cache import one_step; assert one_step().native.stepped == 1"
    subprocess.run([sys.executable, "-c", script], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    assert {path: path.stat().st_mtime_ns for path in folder.glob("*.so")} == made


def test_no_compiler(folder, monkeypatch):
    """Said once, with what is missing; fused=True says the same. Kills: silence, a warning a step, a crash."""
    monkeypatch.setenv("CXX", "/no/such/compiler")
    with pytest.warns(UserWarning, match="there is no C\\+\\+ compiler") as said:
        opt = one_step()
        one_step()
    assert len([w for w in said if "compiler" in str(w.message)]) == 1
    assert opt.native.stepped == 0 and "no C++ compiler" in opt.explain()
    with pytest.raises(ValueError, match="fused=True, but there is no C\\+\\+ compiler"):
        one_step(fused=True)
    one_step(fused=False)


def test_a_compiler_that_fails(folder, monkeypatch, tmp_path):
    """Its words reach the user, and it is not asked again. Kills: a build a step."""
    asked = tmp_path / "asked"
    script = tmp_path / "cxx"
    script.write_text(
        f'#!/bin/sh\n[ "$1" = --version ] && echo it 1.0 && exit 0\necho x >> {asked}; echo no space >&2; exit 1\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    with pytest.warns(UserWarning, match="no space"):
        opt = one_step()
        opt.step()
    assert asked.read_text().count("x") == 1


@pytest.mark.parametrize("damage", ["truncated", "flipped", "empty", "no note", "note is no JSON"])
def test_a_damaged_cache_is_built_anew(folder, damage):
    """Kills: loading a library whose bytes are not those that were written (which ends the process)."""
    one_step()
    (library,) = folder.glob("*.so")
    content, note = library.read_bytes(), library.with_suffix(".json")
    if damage == "truncated":
        cache.replace(library, content[: len(content) // 2])  # never in place: this process has it mapped
    elif damage == "flipped":
        cache.replace(library, content[:-100] + bytes([content[-100] ^ 1]) + content[-99:])
    elif damage == "empty":
        cache.replace(library, b"")
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("{")
    cpu.library.cache_clear()
    cpu.load.cache_clear()
    assert one_step().native.stepped == 1
    assert json.loads(note.read_text())["sha256"] and len(library.read_bytes()) == len(content)


def test_another_version_machine_or_compiler_is_another_file(folder, monkeypatch):
    """Kills: a digest that leaves out the sources, the options, the machine or the compiler."""
    names = {cpu.entry_of(key()).path}
    others = {"sources": "other", "machine": "other False", "compiler": ("g++", "other"), "options": []}
    for what, value in others.items():
        with monkeypatch.context() as patched:
            module = cache if what == "sources" else cpu
            patched.setattr(module, what, lambda value=value: value)
            names.add(cpu.entry_of(key()).path)
    names.add(cpu.entry_of(key("stochastic")).path)
    assert len(names) == 6


def test_a_folder_that_cannot_be_written(folder, monkeypatch, tmp_path):
    """Kills: a crash on clusters whose home is read-only."""
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("SHARDOPT_CACHE", str(blocked / "cache"))
    cache.cache_folder.cache_clear()
    with pytest.warns(UserWarning, match="Set SHARDOPT_CACHE"):
        assert one_step().native.stepped == 1
    assert cache.cache_folder() != folder


def test_one_of_several_processes_builds(folder):
    """Three at once, one compilation. Kills: the lock, and looking again once it is held."""
    script = (
        "import shardopt.kernels.cpu as cpu; from tests.test_kernel_cache import key; build = cpu.build\n"
        "def counted(*given): print('BUILT'); build(*given)\n"
        "cpu.build = counted; cpu.load(key())"
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    running = [
        subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    outputs = [process.communicate(timeout=300)[0] for process in running]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert "".join(outputs).count("BUILT") == 1


def test_a_lock_that_is_never_freed_does_not_stop_a_run(folder, monkeypatch):
    """Kills: waiting for ever on a process that hangs."""
    monkeypatch.setattr(cache, "WAIT", 0.3)
    release = threading.Event()

    def hold():
        with cache.building():
            release.wait(30)

    holder = threading.Thread(target=hold)
    holder.start()
    try:
        time.sleep(0.1)
        began = time.monotonic()
        assert one_step().native.stepped == 1 and time.monotonic() - began < 20
    finally:
        release.set()
        holder.join()


def test_switched_off(folder):
    """SHARDOPT_FUSED=0, read when shardopt is imported. Kills: a switch that nothing reads."""
    script = "from tests.test_kernel_cache import one_step; o = one_step(); print(o.native.stepped, o.explain())"
    env = {**os.environ, "PYTHONPATH": str(ROOT), "SHARDOPT_FUSED": "0"}
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, env=env, check=True, capture_output=True, text=True)
    assert done.stdout.startswith("0 ") and "SHARDOPT_FUSED=0" in done.stdout
    assert not list(folder.glob("*.so"))


def test_built_ahead_of_time_and_listed(folder):
    """What `build` makes is what a step finds. Kills: a command line whose keys differ from the optimizer's."""

    def told(*words):
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "shardopt.kernels", *words]
        return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)

    assert told("build", "--rule", "lion", "--state", "fp32").returncode == 0
    made = set(folder.glob("*.so"))
    assert len(made) == 1 and one_step().native.stepped == 1 and set(folder.glob("*.so")) == made
    listed = told().stdout
    assert "lion/fp32/decay/nearest f32 <- f32" in listed and str(folder) in listed
    refused = told("build", "--rule", "muon")
    assert refused.returncode == 2 and "rule muon has no native twin" in refused.stderr
