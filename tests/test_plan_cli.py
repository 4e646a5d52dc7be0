"""`python -m shardopt.plan`: its table, its JSON, its figure, and what it says to wrong arguments."""

import json
import subprocess
import sys

import pytest

from shardopt.plan.__main__ import main


def output(capsys, *arguments):
    assert main(arguments) == 0
    return capsys.readouterr().out


def test_table(capsys):
    text = output(capsys, "--model", "llama3-8b", "--mesh", "2x8", "--wire", "int8+int4")
    assert "2 replicas x 8 shards" in text
    assert "224 matrices" in text
    assert "the work is shared" in text
    for way in ("all-gather", "full", "gram", "auto", "periodic", "local"):
        assert f"\n{way} " in text
    assert "given: one 400 Gb/s adapter a rank" in text


def test_json_of_4096_ranks(capsys):
    found = json.loads(
        output(capsys, "--model", "llama3-405b", "--mesh", "512x8", "--json", "--share", "no", "--wire", "bf16")
    )
    assert found["mesh"] == "512x8"
    assert not found["plan"]["shared"]
    rows = {row["way"]: row for row in found["ways"]}
    assert rows["full"]["sent"] == pytest.approx(2 * 7 / 64 * 4.016e11 * 2, rel=0.01)
    assert found["costs"]["bandwidth_in"] == 4e11


def test_own_shapes_and_costs(capsys, tmp_path):
    """Fused layouts are just shapes. A stack as long as the mesh stays where it is."""
    path = tmp_path / "shapes.json"
    path.write_text(json.dumps({"qkv": [96, 32], "gate_up": [128, 32], "experts": [4, 16, 32], "router": [3, 32]}))
    arguments = ["--model", str(path), "--mesh", "4", "--members", "--bandwidth-in", "3e11", "--measured"]
    text = output(capsys, *arguments)
    assert "qkv" in text and "96x32" in text
    assert "4x16x32" in text and "shard 0, 1, 2, 3" in text
    assert "3e+11" in text and "measured" in text
    assert "gram" in output(capsys, *arguments, "--mode", "gram")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "llama3-9b"], "neither a file nor one of llama3-8b"),
        (["--model", "llama3-8b", "--mesh", "2x3x4"], "as 8, or replicas x shards"),
        (["--model", "llama3-8b", "--mesh", "0"], "as 8, or replicas x shards"),
        (["--model", "llama3-8b", "--wire", "int7"], "int7"),
        (["--model", "llama3-8b", "--latency", "-1"], "must be at least 0"),
        (["--model", "llama3-8b", "--period", "0"], "must be at least 1"),
        (["--model", "llama3-8b", "--bucket-bytes", "0"], "must be at least 1"),
        (["--model", "llama3-8b", "--bucket-bytes", "inf"], "must be at least 1, and finite"),
    ],
)
def test_errors(capsys, arguments, words):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert not captured.out


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[1]", "not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ('{"norm": [4]}', "norm is no matrix"),
        ("{}", "holds no shapes"),
        ('{"a": [8, 0]}', r"a has shape [8, 0]; sizes are integers of at least 1"),
        ('{"a": [8, 4.5]}', "sizes are integers"),
        ('{"a": [8, "4"]}', "sizes are integers"),
    ],
)
def test_bad_files(capsys, tmp_path, text, words):
    path = tmp_path / "shapes.json"
    path.write_text(text)
    assert main(["--model", str(path)]) == 2
    assert words in capsys.readouterr().err


def test_plot(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "plan.png"
    output(capsys, "--model", "llama3-8b", "--plot", str(path))
    assert path.read_bytes().startswith(b"\x89PNG")
    assert path.stat().st_size < 150_000


def test_a_figure_that_cannot_be_written(tmp_path, capsys):
    """Kills: a traceback after all was computed."""
    pytest.importorskip("matplotlib")
    assert main(["--model", "llama3-8b", "--plot", str(tmp_path / "none" / "plan.png")]) == 2
    told = capsys.readouterr().err
    assert "plan.png: cannot be written (No such file or directory)" in told and told.count("\n") == 1


def test_plot_without_matplotlib(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["--model", "llama3-8b", "--plot", str(tmp_path / "plan.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_as_a_module():
    run = [sys.executable, "-m", "shardopt.plan", "--model", "llama3-8b", "--mesh", "3"]
    found = subprocess.run(run, capture_output=True, text=True, check=True)
    assert "3 shards" in found.stdout
