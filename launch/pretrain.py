"""FSDP2 pretraining of a small decoder with any optimizer of shardopt: `torchrun --nproc-per-node 2 launch/pretrain.py`

Started again with the same `--out`, it says from which checkpoint it goes on, the latest, on any number of ranks; the
first is saved after ten updates. SIGTERM or SIGINT to any rank makes all of them save after the update under way, say
so and exit with 0. (torchrun passes a signal on to its ranks,
but its own exit code is then 1.)
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # started as a file: its own folder is on the path, and must not be
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import torch
import torch.distributed as dist

import shardopt
from launch import mesh, optim
from launch.checkpoints import Checkpoints
from launch.config import Config, parse
from launch.data import Corpus, load
from launch.loop import StopFlag, evaluate, evaluation_mode, train
from launch.model import generate
from launch.runlog import RunLog


def say(place: mesh.Place, text: str) -> None:
    if place.first:
        print(text, flush=True)


def check_same_corpus(corpus: Corpus) -> None:
    hashes: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(hashes, corpus.hash)
    if len(set(hashes)) > 1:
        raise ValueError(f"the ranks read different texts: hashes {hashes}; give all of them the same --data")


def sample(model: torch.nn.Module, optimizer: Any, config: Config, place: mesh.Place) -> str:
    prompt = torch.tensor(list(config.prompt.encode()) or [0], device=place.device)
    with evaluation_mode(model, optimizer):
        tokens = generate(model, prompt, config.sample, config.context, config.seed).tolist()
    return bytes(tokens).decode(errors="replace") if config.vocab <= 256 else str(tokens)


def finish(
    model: torch.nn.Module, optimizer: Any, job: tuple[Config, Corpus, mesh.Place], saved: int, log: RunLog
) -> None:
    """What is said and written once all updates are done."""
    config, corpus, place = job
    val_loss = log.last.get("val_loss") if place.first else None
    needed = torch.tensor(float(place.first and val_loss is None), device=place.device)
    dist.all_reduce(needed)
    if needed.item():  # a finished run that was started again without its log
        val_loss = evaluate(model, optimizer, config, corpus, place)
    text = sample(model, optimizer, config, place) if config.sample else ""
    state_bytes = shardopt.state_bytes(optimizer).per_parameter
    summary = {
        "val_loss": val_loss,
        "state_bytes_per_parameter": state_bytes,
        "parameters": sum(p.numel() for p in model.parameters()),
        "checkpoint_bytes": saved,
        "seconds": log.last.get("time"),
        "corpus": corpus.hash,
        "skipped_steps": int(getattr(optimizer, "skipped_steps", 0)),
        "config": dataclasses.asdict(config),
    }
    if not place.first:
        return
    out = Path(config.out)
    (out / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if text:
        (out / "sample.txt").write_text(text, encoding="utf-8")
        print(f"--- sample\n{text}\n---")
    if config.plot:
        from launch.plots import plot

        plot({f"{config.optimizer} {config.state}": out / "log.jsonl"}, out / "loss.png")
    print(f"validation loss {val_loss:.4f} nats/token, state {state_bytes:.3f} B/param, written to {out}", flush=True)


def run(config: Config, stop: StopFlag) -> None:
    place = mesh.start(config)
    corpus = load(config)
    check_same_corpus(corpus)
    model = mesh.build_model(config, place)
    optimizer = optim.build(model, config)
    count = sum(p.numel() for p in model.parameters())
    say(place, f"{corpus.name}: {len(corpus.train):,} + {len(corpus.val):,} tokens, hash {corpus.hash}")
    say(place, f"{count:,} parameters on {dist.get_world_size()} x {place.device.type}, mesh {place.axes}")
    own = optim.given(optimizer)
    checkpoints = Checkpoints(config, model, optimizer, corpus)
    step = checkpoints.restore()
    schedule = optim.scheduler(optimizer, config, step, own)
    if hasattr(optimizer, "explain"):
        explained = optimizer.explain()
        say(place, explained)
    say(place, checkpoints.told())
    say(place, f"resumed after step {step}" if step else "starting at step 0")
    log = RunLog(Path(config.out) / "log.jsonl", step, place.first)
    done = train(model, optimizer, schedule, config, corpus, place, checkpoints, log, step, stop)
    if done:
        finish(model, optimizer, (config, corpus, place), checkpoints.size(), log)
    else:
        step, folder = checkpoints.saved, checkpoints.folder
        say(place, f"stopped by a signal after step {step}: saved in {folder}, the same command goes on there")
    log.close()
    mesh.stop()


def main() -> None:
    try:
        run(parse(sys.argv[1:]), StopFlag())
    except ValueError as error:  # what the user can mend, in one line and not as a traceback a rank
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
