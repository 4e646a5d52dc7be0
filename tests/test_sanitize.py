"""That launch/sanitize sees what it is for: a kernel that leaves its arrays."""

import os
import subprocess
import sys

import pytest

from launch.runs import ROOT


@pytest.mark.slow
def test_it_tells_of_a_number_too_many():
    """Kills: a sanitizer that is not in the kernels, one that takes what is in order for an error, findings that nobody
    hears."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"PY": sys.executable}
    command = [ROOT / "launch" / "sanitize", "tests/overflowing.py"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode == 77:
        pytest.skip(done.stderr)
    words = done.stdout + done.stderr
    assert done.returncode == 1 and words.count("ERROR: AddressSanitizer") == words.count("runtime error") == 1, words
    assert "132-byte region" in words and "shift exponent 40" in words
