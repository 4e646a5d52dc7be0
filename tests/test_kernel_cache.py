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
from shardopt.kernels import cache, cpu, native, native_walk, wire
from shardopt.kernels.__main__ import USUAL
from shardopt.kernels.__main__ import main as command
from shardopt.kernels.key import key_at
from shardopt.recipe import Recipe
from shardopt.rules import RULES, Lion
from tests.processes import started

pytestmark = pytest.mark.shipped
ROOT = Path(__file__).parents[1]


def key(rounding: str = "nearest"):
    """Of one_step, where it rounds to nearest."""
    recipe = Recipe(Lion(), "fp32", ("decay",), rounding)
    return key_at(recipe, (64, 64), torch.float32, torch.float32)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache of this test's own, and nothing remembered of the machine."""

    def forget():
        for remembered in (
            cache.cache_folder,
            cpu.compiler,
            cpu.library,
            cpu.load,
            native_walk.library,
            wire.native,
        ):
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


def step_in(folder, builds):
    """One step in a process of its own, which leaves a file where it compiles."""
    os.environ["SHARDOPT_CACHE"] = str(folder)
    build = cpu.build
    cpu.build = lambda *given: ((builds / str(os.getpid())).touch(), build(*given))[1]
    assert one_step().native.stepped == 1


def in_processes(count, folder):
    """A step in so many processes at once; the files of those that compiled."""
    builds = folder.parent / "builds"
    builds.mkdir()
    running = [started(step_in, folder, builds) for _ in range(count)]
    for process in running:
        process.join(300)
    assert [process.exitcode for process in running] == [0] * count
    return list(builds.iterdir())


def test_compiled_once_and_found_again(folder):
    """Kills: a name that changes from process to process, a cache that is never read."""
    assert one_step().native.stepped == 1
    made = {path: path.stat().st_mtime_ns for path in folder.glob("*.so")}
    assert len(made) == 1
    note = json.loads(next(iter(made)).with_suffix(".json").read_text())
    assert note["key"].startswith("lion/fp32") and note["seconds"] > 0 and "Lion" in note["cpp"]
    assert in_processes(1, folder) == []
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
            patched.setattr(module, what, lambda *_, value=value: value)
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
    assert len(in_processes(3, folder)) == 1


@pytest.mark.parametrize("whose", ["its own", "another's"])
def test_a_lock_that_is_never_freed_does_not_stop_a_run(folder, monkeypatch, whose):
    """Kills: waiting for ever on a process that hangs, or at all on one that builds another kernel."""
    stem = cpu.entry_of(key()).path.stem
    monkeypatch.setattr(cache, "WAIT", 0.3 if whose == "its own" else 300)
    held = stem if whose == "its own" else ("1" if stem[0] == "0" else "0") + stem[1:]
    release = threading.Event()

    def hold():
        with cache.building([cache.Entry(held, ".so")]):
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


def test_built_ahead_of_time_and_listed(folder, capsys):
    """What `build` makes is what a step finds. Kills: a command line whose keys differ from the optimizer's."""

    words = [sys.executable, "-m", "shardopt.kernels", "build", "--rule", "lion", "--state", "fp32"]
    subprocess.run(words, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True)
    made = set(folder.glob("*.so"))
    assert len(made) == 1 and one_step().native.stepped == 1 and set(folder.glob("*.so")) == made
    assert command([]) == 0
    listed = capsys.readouterr().out
    assert "lion/fp32/decay/nearest f32 <- f32" in listed and str(folder) in listed
    assert command(["build", "--rule", "lion", "--state", "int8(block=8192)"]) == 2
    assert "has blocks of more than 4096 elements" in capsys.readouterr().err


def test_messages_are_built_ahead_of_time_too(folder, monkeypatch):
    """A step of Muon compiles nothing after `build`. Kills: codecs of the wire that are left to the first step."""
    assert command(["build", "--rule", "muon", "--option", "wire='int8+int4'"]) == 0
    made = set(folder.glob("*.so"))
    assert len(made) == 3
    p = nn.Parameter(torch.ones(64, 64))
    p.grad = torch.ones(64, 64)
    optimizer = shardopt.Muon([p], wire="int8+int4", fused=True)
    optimizer.step()
    assert optimizer.native.stepped == 1 and set(folder.glob("*.so")) == made


@pytest.mark.parametrize(
    "words, why",
    [
        (["--state", "int9"], "state='int9' is neither a preset"),
        (["--arch", "sm_12x"], "--arch 'sm_12x' is neither cpu nor a GPU's"),
        (["--arch", "cpu,gpu"], "--arch 'gpu'"),
        (["--option", "amsgrad=True"], "adamw has lr, betas"),
        (["--rounding", "up"], "rounding is 'up'"),
        (["--addons", "luck"], "add-on 'luck' is unknown"),
        (["--rule", "muon", "--option", "wire=5"], "wire is 5; give one of"),
        (["--rule", "muon", "--option", "split=3.5"], "split is 3.5; give the rows of a block, an integer"),
        (["--rule", "muon", "--option", "split='a'"], "split is 'a'; give the rows of a block"),
    ],
)
def test_what_cannot_be_built_is_one_line(folder, capsys, words, why):
    """Kills: a traceback, or exit code 0 or 1."""
    assert command(["build", *words]) == 2
    told = capsys.readouterr().err
    assert why in told and told.count("\n") == 1


@pytest.mark.parametrize("preset", sorted(shardopt.presets.PRESETS))
def test_what_is_built_unless_told_otherwise_is_what_the_optimizer_runs(preset):
    """Kills: sqrt8 for all, which Muon and Adafactor never run by default."""
    recipe = shardopt.presets.PRESETS[preset]([nn.Parameter(torch.zeros(64, 64))], lr=1e-3).recipes[0]
    name = recipe.rule.name
    assert Recipe(RULES[name](), USUAL.get(name, "int8")).state == recipe.state
