"""The pretraining job's parts: options, data order, weights, model, schedule, log; and meshes under torchrun."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch.distributed.tensor import debug
from torch.testing._internal.distributed.fake_pg import FakeStore

from launch import config as options
from launch import data, mesh, optim, runlog, runs, weights
from launch.config import Config
from launch.model import Decoder, generate

SMALL = Config(dim=32, layers=2, heads=4, context=16, vocab=256, global_batch=7, eval_batches=2)


# options


def test_command_line_wins_over_toml_and_toml_over_defaults(tmp_path):
    file = tmp_path / "run.toml"
    file.write_text('[model]\ndim = 64\nheads = 8\n[optimizer]\nlr = 1\n[state]\nexp_avg = "int8"\n')
    parsed = options.parse(["--config", str(file), "--dim", "128", "--global-batch", "9", "--plot", "false"])
    assert (parsed.dim, parsed.heads, parsed.lr, parsed.global_batch, parsed.plot) == (128, 8, 1.0, 9, False)
    assert parsed.layers == Config().layers and isinstance(parsed.lr, float)
    assert options.parse(["--config", str(file), "--state.exp_avg_sq", "log8"]).state == {
        "exp_avg": "int8",
        "exp_avg_sq": "log8",
    }


@pytest.mark.parametrize("text", ["exp_avg=int8, exp_avg_sq=log8", '{"exp_avg": "int8", "exp_avg_sq": "log8"}'])
def test_state_per_slot(text):
    assert options.parse(["--state", text]).state == {"exp_avg": "int8", "exp_avg_sq": "log8"}


def test_shipped_configurations_parse():
    for file in sorted((runs.ROOT / "launch" / "configs").glob("*.toml")):
        options.parse(["--config", str(file)])


def test_wrong_options_are_refused_with_words(tmp_path, capsys):
    file = tmp_path / "run.toml"
    file.write_text("step = 3\n")
    with pytest.raises(ValueError, match="did you mean 'steps'"):
        options.parse(["--config", str(file)])
    with pytest.raises(ValueError, match=r"--config is .*nowhere\.toml, where there is no file"):
        options.parse(["--config", str(tmp_path / "nowhere.toml")])
    for wrong in ("wire=bf16", "[1]"):
        with pytest.raises(ValueError, match=r"--optimizer_args is .*; give a JSON object"):
            optim.further(wrong)
    with pytest.raises(ValueError, match="micro_batch is -1"):
        Config(micro_batch=-1)
    with pytest.raises(ValueError, match="kv_heads 3"):
        Config(kv_heads=3)
    with pytest.raises(SystemExit):
        options.parse(["--stat.exp_avg", "int8"])
    assert "unknown argument --stat.exp_avg" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        options.parse(["--optimzer", "lion"])
    assert "did you mean '--optimizer'" in capsys.readouterr().err


# data


@pytest.mark.parametrize("world", [1, 2, 3, 5, 11])
def test_data_order_knows_no_ranks(world):
    tokens = np.arange(5000, dtype=np.uint16)
    whole = data.train_batch(tokens, SMALL, step=3, rank=0, world=1)
    parts = [data.train_batch(tokens, SMALL, step=3, rank=rank, world=world) for rank in range(world)]
    assert torch.equal(torch.cat(parts), whole) and whole.shape == (7, 17)
    assert not torch.equal(whole, data.train_batch(tokens, SMALL, step=4, rank=0, world=1))
    evals = [data.eval_batch(tokens, SMALL, 1, rank, world) for rank in range(world)]
    assert torch.equal(torch.cat(evals), data.eval_batch(tokens, SMALL, 1, 0, 1))


def test_data_order_is_a_file_format():
    """A change of these numbers would change every resumed run."""
    assert data.offsets(0, 0, range(3), 10**6).tolist() == [627171, 566784, 233728]
    assert data.offsets(1, 7, range(2, 4), 10**6).tolist() == [412601, 187378]


def test_windows_cover_the_text_evenly():
    starts = data.offsets(0, 5, range(20000), 100)
    counts = np.bincount(starts, minlength=100)
    assert counts.min() > 130 and counts.max() < 270  # 200 expected, 5 standard deviations of 14
    last = data.eval_batch(np.arange(1000), SMALL, SMALL.eval_batches - 1, 0, 1)[-1]
    assert last[-1] == 999


def test_every_rank_makes_the_same_number_of_passes():
    for count, world, micro in [(7, 3, 1), (7, 3, 2), (1, 4, 0), (2, 5, 1), (16, 3, 4)]:
        passes = data.rounds(count, world, micro)
        assert all(len(data.share(count, rank, world)) <= passes * (micro or count) for rank in range(world))


def test_split_by_file_is_stable(tmp_path):
    for name in [f"m{i}.py" for i in range(60)] + ["tests/no.py", "a/test/no.py"]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"<{name}>")
    first = data.read_folder(tmp_path, "*.py", 0.2)
    assert b"no.py" not in first.train.tobytes() + first.val.tobytes()
    (tmp_path / "zz.py").write_text("more")
    second = data.read_folder(tmp_path, "*.py", 0.2)
    assert first.hash != second.hash and second.hash == data.read_folder(tmp_path, "*.py", 0.2).hash
    assert second.train.tobytes().replace(b"more", b"") == first.train.tobytes()
    assert second.val.tobytes().replace(b"more", b"") == first.val.tobytes() and len(first.val)


def test_token_file_is_mapped(tmp_path):
    np.arange(1000, dtype=np.uint16).tofile(tmp_path / "t.bin")
    corpus = data.load(Config(data=str(tmp_path / "t.bin"), val_fraction=0.2, context=16))
    assert len(corpus.train) == 800 and corpus.val[0] == 800
    with pytest.raises(ValueError, match="neither a folder"):
        data.load(Config(data=str(tmp_path / "absent")))


# model and weights


@pytest.mark.parametrize("changes", [{}, {"kv_heads": 2}, {"tied": True}, {"qk_norm": False, "kv_heads": 1}])
def test_model_is_causal_and_has_the_right_shapes(changes):
    config = Config(**(dict(dim=32, layers=2, heads=4, context=16, zero_init=False, zero_head=False) | changes))
    model = Decoder(config)
    weights.init_weights(model, config)
    tokens = torch.randint(0, 256, (2, 16))
    logits = model(tokens)
    assert logits.shape == (2, 16, 256) and logits.std() > 0.1
    assert model.blocks[0].attention.wk.weight.shape[0] == 8 * (config.kv_heads or 4)
    other = tokens.clone()
    other[:, 10:] = 0
    assert torch.allclose(model(other)[:, :10], logits[:, :10], atol=1e-5)
    assert not torch.allclose(model(other)[:, 10:], logits[:, 10:], atol=1e-2)
    sampled = generate(model, tokens[0], 5, config.context, seed=0)
    assert sampled.shape == (21,) and torch.equal(sampled, generate(model, tokens[0], 5, config.context, seed=0))


def test_zero_initialised_outputs_give_a_uniform_guess():
    model = Decoder(SMALL)
    weights.init_weights(model, SMALL)
    assert not model(torch.zeros(1, 4, dtype=torch.int64)).any()


def local_shards(world: int, tp: int) -> tuple[dict[str, torch.Tensor], list[dict[str, torch.Tensor]]]:
    """The whole initial weights, and what each of `world` ranks holds of them."""
    config = Config(dim=32, layers=1, heads=4, context=16, vocab=256, tp=tp, zero_head=False)
    model, ranks = Decoder(config), []
    weights.init_weights(model, config)
    for rank in range(world):
        # Meshes of different ranks compare equal, so that what is cached for one would be used for the next.
        for clear in (
            "_clear_sharding_prop_cache",
            "_clear_fast_path_sharding_prop_cache",
            "_clear_python_sharding_prop_cache",
        ):
            getattr(debug, clear, bool)()
        dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world)
        try:
            sharded = mesh.build_model(config, mesh.lay(config, torch.device("cpu")))
            ranks.append({name: p.to_local().detach().clone() for name, p in sharded.named_parameters()})
        finally:
            dist.destroy_process_group()
    return {name: p.detach() for name, p in model.named_parameters()}, ranks


@pytest.mark.parametrize("world", [1, 3, 5])
def test_weights_are_the_same_for_any_number_of_ranks(world):
    full, ranks = local_shards(world, tp=1)
    for name, parameter in full.items():
        assert torch.equal(torch.cat([rank[name] for rank in ranks]), parameter), name


def test_weights_are_the_same_under_tensor_parallelism():
    full, ranks = local_shards(4, tp=2)  # rank = shard * 2 + tp
    halves = [{name: torch.cat([ranks[t][name], ranks[2 + t][name]]) for name in full} for t in range(2)]
    for name, parameter in full.items():
        if parameter.ndim == 1:
            assert torch.equal(halves[0][name], parameter) and torch.equal(halves[1][name], parameter), name
        else:
            dim = 1 if name.endswith(("wo.weight", "w2.weight")) else 0
            assert torch.equal(torch.cat([half[name] for half in halves], dim), parameter), name


# optimizer


def test_schedule():
    linear = Config(steps=100, warmup=10, schedule="linear", decay_from=0.5)
    assert [optim.factor(k, linear) for k in (0, 9, 10, 49, 50, 75)] == [0.1, 1, 1, 1, 1, 0.5]
    cosine = Config(steps=110, warmup=10, schedule="cosine", min_lr=0.1)
    assert optim.factor(60, cosine) == pytest.approx(0.55) and optim.factor(110, cosine) == pytest.approx(0.1)


def test_schedule_of_a_resumed_run_is_derived_from_its_step():
    model = Decoder(SMALL)

    def rates(start: int, end: int) -> list[list[float]]:
        optimizer = torch.optim.AdamW(optim.parameter_groups(model, SMALL))
        own = optim.given(optimizer)
        optimizer.param_groups[0]["lr"] = 77.0  # as a checkpoint would leave it
        schedule, seen = optim.scheduler(optimizer, SMALL, start, own), []
        for _ in range(start, end):
            seen.append([group["lr"] for group in optimizer.param_groups])
            optimizer.step()
            schedule.step()
        return seen

    whole = rates(0, 40)
    assert rates(17, 40) == whole[17:] and whole[19] == pytest.approx([3e-3, 3e-2, 3e-3])


def test_groups_hold_every_parameter_once():
    model = Decoder(Config(dim=32, heads=4, tied=True))
    groups = optim.parameter_groups(model, SMALL)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted({id(p) for p in model.parameters()})
    assert [len(group["params"]) for group in groups] == [3 * 7, 1, 3 * 2 + 1]


# log


def test_log_drops_what_comes_after_the_restored_step(tmp_path):
    path = tmp_path / "log.jsonl"
    log = runlog.RunLog(path, 0, first=True)
    for step in range(1, 6):
        log.write(step=step, loss=1.0, time=step / 2)
    log.close()
    path.write_text(path.read_text() + '{"step": 6, "lo')
    again = runlog.RunLog(path, 3, first=True)
    again.write(step=4, loss=2.0, time=9.0)
    again.close()
    assert again.seconds == 1.5
    assert [(x["step"], x["loss"]) for x in runlog.read(path)] == [(1, 1.0), (2, 1.0), (3, 1.0), (4, 2.0)]


# under torchrun


SIZES = {"dim": 32, "layers": 1, "context": 32, "global_batch": 5, "warmup": 2, "sample": 8, "eval_batches": 1}
TINY = [f"--{key}={value}" for key, value in SIZES.items()]


def losses(out: Path, ranks: int, *more: str) -> list[float]:
    run = runs.begin(ranks, *TINY, *more, "--out", str(out), output=out.with_suffix(".txt"))
    try:
        assert run.wait(timeout=240) == 0, out.with_suffix(".txt").read_text()[-4000:]
    finally:
        runs.kill(run)
    return [value for line in runlog.read(out / "log.jsonl") for key, value in line.items() if "loss" in key]


@pytest.mark.multigpu
@pytest.mark.slow
def test_meshes_give_the_losses_of_one_rank(tmp_path):
    """Also with 5 sequences on 4 ranks, one at a time, and with weights that tensor parallelism shards twice."""
    five = ["--steps", "5", "--eval-every", "2"]
    alone = losses(tmp_path / "alone", 1, *five)
    assert len(alone) == 8 and alone[4] < alone[0] - 0.1
    assert losses(tmp_path / "tp", 4, *five, "--tp", "2") == pytest.approx(alone, abs=1e-3)
    assert losses(tmp_path / "hsdp", 4, *five, "--replicate", "2", "--micro-batch", "1") == pytest.approx(
        alone, abs=1e-3
    )
    for name in ("alone", "tp", "hsdp"):
        assert (tmp_path / name / "loss.png").stat().st_size > 10_000 and (tmp_path / name / "sample.txt").exists()


@pytest.mark.multigpu
@pytest.mark.slow
def test_killed_and_stopped_runs_go_on_as_if_nothing_had_happened(tmp_path):
    out, name = tmp_path / "run", ["--steps", "60", "--keep", "9", "--checkpoint-every", "10", "--eval-every", "0"]
    whole = losses(tmp_path / "whole", 1, *name)

    def until(step: int, ranks: int) -> subprocess.Popen[bytes]:
        run = runs.begin(ranks, *TINY, *name, "--out", str(out), output=tmp_path / "run.txt")
        # A save is asynchronous: the steps may be far ahead of it.
        committed = out / "checkpoints" / "step_00000010" / "COMMITTED"
        while not (lines := runlog.read(out / "log.jsonl")) or lines[-1]["step"] < step or not committed.exists():
            assert run.poll() is None, (tmp_path / "run.txt").read_text()[-4000:]
            time.sleep(0.02)
        return run

    runs.kill(until(14, 2))
    stopped = until(22, 3)
    os.kill(runs.workers(stopped)[0], signal.SIGTERM)
    assert stopped.wait(timeout=120) == 0
    assert losses(out, 2, *name) == pytest.approx(whole, abs=1e-3)
    says = (tmp_path / "run.txt").read_text().splitlines()
    starts = [int(line.split()[-1]) for line in says if line.startswith(("resumed after", "starting at"))]
    assert starts[0] == 0 and starts[1] >= 10 and starts[1] % 10 == 0 and starts[2] >= 22
