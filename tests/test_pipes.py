"""Commands whose reader leaves: real processes, real pipes, and no traceback."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

import shardopt

COMMANDS = {
    "plan": ["shardopt.plan", "--model", "llama3-8b", "--members"],
    "its help": ["shardopt.plan", "--help"],
    "kernels": ["shardopt.kernels"],
    "checkpoint": ["shardopt.checkpoint_info", "FOLDER"],
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
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_leaves_is_no_error(name, unbuffered, folder):
    """Before the first line is written, so that every write fails: those of print itself where nothing is buffered,
    else the one at the end. Kills: a traceback from either, Python's own words about a flush that it ignored.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    run = started(COMMANDS[name], folder, stderr=subprocess.PIPE, env=environment)
    run.stdout.close()
    said = run.stderr.read()
    unheard = name == "its help" and unbuffered == "1"  # argparse itself passes over it
    assert (run.wait(timeout=120), said) == (0 if unheard else 1, "")


def test_a_reader_that_stays_gets_all(folder):
    """Kills: an exit code, or words, that are lost on the way."""
    run = started(COMMANDS["checkpoint"], folder)
    text, _ = run.communicate(timeout=120)
    assert run.returncode == 0 and "layer_7" in text and "sizes verified" in text
    bad = started(["shardopt.plan", "--model", "none"], folder, stderr=subprocess.PIPE)
    assert "neither a file nor one of" in bad.communicate(timeout=120)[1] and bad.returncode == 2
