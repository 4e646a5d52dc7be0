"""Paired-seed training runs: what a state format, a rounding or a rule costs in validation loss.

A byte-level GPT of 0.4M parameters on the Python standard library's sources, 300 steps; same seed and same data
order for every contender, so that differences are paired. The embedding and head have their own learning rate.

    python -m benchmarks.quality run --only adamw-fp32 adamw-int8 --seeds 0 1 2
    python -m benchmarks.quality table
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass, fields, replace
from math import isfinite
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

import shardopt
from benchmarks.quality_muon import CONTENDERS as MUON
from launch import data
from launch.config import Config
from launch.model import Decoder
from launch.weights import init_weights
from tests.bad_codecs import LinearUint4, LinearUint8, PlainUint4

RESULTS = Path(__file__).parent / "results" / "quality.jsonl"
SMALL = Config(
    dim=96, layers=3, heads=4, context=96, hidden=256, global_batch=16, steps=300, eval_batches=32, qk_norm=True
)
BASES = {"muon": "muon-fp32-exact", "adamw": "adamw-fp32"}
LONG = replace(SMALL, dim=128, layers=5, hidden=384, steps=1000)
Make = Callable[..., torch.optim.Optimizer]
"""Groups and the shared settings to an optimizer."""


@dataclass(frozen=True)
class Settings:
    """What every contender of one comparison shares. `embed_lr` is the rate of embedding and head."""

    lr: float = 6e-3
    embed_lr: float = 6e-2
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.1
    steps: int = 300


def adamw(state: Any, **options: Any) -> Make:
    return lambda groups, at: shardopt.AdamW(
        groups, betas=(0.9, at.beta2), eps=at.eps, weight_decay=at.weight_decay, state=state, **options
    )


def mapped(signed: Any, non_negative: Any) -> dict[str, Any]:
    return {"signed": signed, "non_negative": non_negative}


CONTENDERS: dict[str, Make] = {
    "adamw-fp32": adamw("fp32"),
    "adamw-bf16": adamw("bf16"),
    "adamw-int8": adamw("int8"),
    "adamw-int4": adamw("int4"),
    "adamw-factored": adamw("factored"),
    "adamw-fp32-bf16-stochastic": adamw("fp32", rounding="stochastic"),
    "adamw-fp32-bf16-nearest": adamw("fp32"),
    "adamw-fp32-bf16-kahan": adamw("fp32", rounding="kahan"),
    "control-linear-uint8": adamw(mapped("int8", LinearUint8())),
    "control-plain-int4": adamw(mapped("int4", PlainUint4())),
    "control-linear-int4": adamw(mapped("int4", LinearUint4())),
}
for signed in ("int8", "sqrt8", "dyn8", "int4", "dyn4", "fp8", "int4(block=64)", "dyn4(block=64)"):
    for second in ("log8", "root4", "dyn8", "log4", "factored", "fp32"):
        CONTENDERS[f"adamw-{signed}-{second}"] = adamw(mapped(signed, second))


CONTENDERS.update(MUON)


def base_of(name: str) -> str:
    """What a contender is paired with: fp32 state, and for Muon an exact wire."""
    return BASES["muon" if "muon" in name else "adamw"]


def groups_of(model: nn.Module, lr: float, embed_lr: float) -> list[dict[str, Any]]:
    outer = [p for n, p in model.named_parameters() if n.startswith(("embed", "head"))]
    inner = [p for n, p in model.named_parameters() if not n.startswith(("embed", "head"))]
    return [{"params": inner, "lr": lr}, {"params": outer, "lr": embed_lr}]


def schedule(step: int, steps: int) -> float:
    """20 steps of warm-up, then constant, linear to zero over the second half."""
    return min(1.0, (step + 1) / 20, 2 * (steps - step) / steps)


torch.set_num_threads(1)


def train(name: str, seed: int, at: Settings, config: Config) -> dict[str, Any]:
    config = replace(config, seed=seed)
    corpus = data.load(config)
    torch.manual_seed(seed)
    model = Decoder(config)
    init_weights(model, config)
    low = "-bf16-" in name
    if low:
        model.to(torch.bfloat16)
    optimizer = CONTENDERS[name](groups_of(model, at.lr, at.embed_lr), at)
    rates = [group["lr"] for group in optimizer.param_groups]

    def loss_of(batch: torch.Tensor) -> torch.Tensor:
        weights = {n: p.float() if low else p for n, p in model.named_parameters()}
        logits = functional_call(model, weights, (batch[:, :-1],))
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())

    curve, spent = [], 0.0
    for step in range(config.steps):
        for group, rate in zip(optimizer.param_groups, rates):
            group["lr"] = rate * schedule(step, config.steps)
        loss = loss_of(data.train_batch(corpus.train, config, step, 0, 1))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        before = time.perf_counter()
        optimizer.step()
        spent += time.perf_counter() - before
        curve.append(round(float(loss.detach()), 4))
        if not curve[-1] < 100:
            break
    with torch.no_grad():
        batches = [data.eval_batch(corpus.val, config, i, 0, 1) for i in range(config.eval_batches)]
        losses = [float(loss_of(batch)) for batch in batches]
    return {
        "name": name,
        "seed": seed,
        **asdict(at),
        "parameters": sum(p.numel() for p in model.parameters()),
        "corpus": corpus.hash,
        "loss": round(statistics.mean(losses), 5) if len(curve) == config.steps else float("nan"),
        "step_seconds": round(spent / len(curve), 4),
        "curve": curve[:: max(1, config.steps // 100)],
    }


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def settings_of(row: dict[str, Any]) -> Settings:
    return Settings(**{field.name: row[field.name] for field in fields(Settings)})


def run(names: list[str], seeds: list[int], at: Settings, config: Config) -> None:
    for seed in seeds:
        for name in names:
            if (name, seed, at) in {(row["name"], row["seed"], settings_of(row)) for row in read()}:
                continue
            row = train(name, seed, at, config)
            RESULTS.parent.mkdir(exist_ok=True)
            with RESULTS.open("a") as out:
                out.write(json.dumps(row) + "\n")
            print(f"{name:44} seed {seed} loss {row['loss']:.5f}  step {row['step_seconds'] * 1e3:.0f} ms", flush=True)


Losses = dict[tuple[Settings, str, int], float]  # of a machine, by settings, name and seed


def paired(rows: Losses, at: Settings, name: str) -> dict[int, float]:
    """Seed -> difference to the base at the same settings and seed."""
    base = base_of(name)
    losses = {seed: loss for (where, who, seed), loss in rows.items() if (where, who) == (at, name)}
    return {seed: loss - rows[at, base, seed] for seed, loss in losses.items() if (at, base, seed) in rows}


def table(seeds: list[int]) -> None:
    """Of every machine (a file) mean loss, and mean and spread of the paired differences; then of all machines."""
    machines: list[Losses] = []
    for path in sorted(RESULTS.parent.glob("quality*.jsonl")):
        print(path.name)
        rows = {(settings_of(row), row["name"], row["seed"]): row["loss"] for row in read(path) if row["seed"] in seeds}
        machines.append(rows)
        for at in sorted({key[0] for key in rows}, key=astuple):
            print(" ".join(f"{name} {value:g}" for name, value in asdict(at).items()))
            for name in dict.fromkeys(key[1] for key in rows if key[0] == at):
                losses = [loss for key, loss in rows.items() if key[:2] == (at, name)]
                pairs = list(paired(rows, at, name).values())
                difference = f"{statistics.mean(pairs):+9.5f}" if pairs else " " * 9
                spread = f"{statistics.stdev(pairs):8.5f}" if len(pairs) > 1 and all(map(isfinite, pairs)) else ""
                print(f"  {name:36} {len(losses):2} seeds {statistics.mean(losses):9.5f} {difference} {spread}")
    over_machines(machines)


def over_machines(machines: list[Losses]) -> None:
    """Mean over seeds of each seed's mean over its machines, and its standard error; equal runs count once."""
    print("all machines: mean and standard error over seeds")
    for at, name in dict.fromkeys(key[:2] for rows in machines for key in rows):
        runs = [pair for rows in machines for pair in paired(rows, at, name).items()]
        means = [statistics.mean({pair for s, pair in runs if s == seed}) for seed in dict(runs)]
        if len(means) > 1 and all(map(isfinite, means)):
            mean, error = statistics.mean(means), statistics.stdev(means) / len(means) ** 0.5
            print(f"  {name:36} {len(means):2} seeds {mean:+9.5f} {error:8.5f}  lr {at.lr:g} beta2 {at.beta2:g}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", choices=("run", "table", "names"))
    parser.add_argument("--only", nargs="*", default=["adamw-fp32", "adamw-int8", "adamw-int4"])
    parser.add_argument("--seeds", nargs="*", type=int, default=[20, 21, 22])
    for field in fields(Settings):
        if field.name != "steps":
            parser.add_argument("--" + field.name.replace("_", "-"), type=float, default=field.default)
    parser.add_argument("--long", action="store_true", help="1,000 steps of a model of 1M parameters")
    options = parser.parse_args()
    config = LONG if options.long else SMALL
    chosen = {field.name: getattr(options, field.name) for field in fields(Settings) if field.name != "steps"}
    if options.what == "run":
        run(options.only, options.seeds, Settings(**chosen, steps=config.steps), config)
    elif options.what == "names":
        print("\n".join(CONTENDERS))
    else:
        table(options.seeds)


if __name__ == "__main__":
    main()
