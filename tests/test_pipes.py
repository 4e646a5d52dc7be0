"""Commands whose reader leaves: real processes, real pipes, and no traceback."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import shardopt

PLAN, INFO = ["shardopt.plan", "--model", "llama3-8b", "--members"], ["shardopt.checkpoint_info", "FOLDER"]
COMMANDS = {  # and PYTHONUNBUFFERED
    "plan": (PLAN, ""),
    "plan, line by line": (PLAN, "1"),
    "help": (["shardopt.plan", "--help"], ""),
    "kernels": (["shardopt.kernels"], ""),
    "checkpoint": (INFO, ""),
}


@pytest.fixture
def folder(tmp_path):
    """A checkpoint that is told in many lines."""
    model = nn.ParameterDict({f"layer_{i}": nn.Parameter(torch.ones(3)) for i in range(8)})
    opt = shardopt.SGD(model.parameters())
    shardopt.save_checkpoint(tmp_path / "run", model, opt, step=1)
    return tmp_path / "run"


def started(arguments, folder, **pipes):
    arguments = [str(folder) if word == "FOLDER" else word for word in arguments]
    return subprocess.Popen([sys.executable, "-m", *arguments], stdout=subprocess.PIPE, text=True, **pipes)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_reader_that_leaves_is_no_error(name, folder):
    """Before the first line is written, so that every write fails: those of print itself where nothing is buffered,
    else the one at the end. Kills: a traceback from either, Python's own words about a flush that it ignored.
    """
    arguments, unbuffered = COMMANDS[name]
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = started(arguments, folder, stderr=subprocess.PIPE, env=environment)
    run.stdout.close()
    said = run.stderr.read()
    assert (run.wait(timeout=120), said) == (1, "")


def test_a_reader_that_stays_gets_all(folder):
    """Kills: an exit code, or words, that are lost on the way."""
    run = started(INFO, folder)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and "layer_7" in text and "sizes verified" in text
