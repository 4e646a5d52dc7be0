"""The training loop: one update, one evaluation, and the order in which a run steps, evaluates, logs and saves."""

from __future__ import annotations

import signal
import sys
import time
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

import shardopt

from . import optim
from .checkpoints import Checkpoints
from .config import Config
from .data import Corpus, eval_batch, rounds, train_batch
from .mesh import Place
from .runlog import RunLog


class StopFlag:
    """Set by SIGTERM and SIGINT; acted upon between updates, once all ranks know of it."""

    def __init__(self) -> None:
        self.set = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.raise_it)

    def raise_it(self, number: int, frame: Any) -> None:
        self.set = True


def loss_sum(model: nn.Module, rows: Tensor, place: Place) -> Tensor:
    """Summed cross entropy of `rows` (count, context + 1); no rows still run the model, for its collectives."""
    weight = 1.0 if len(rows) else 0.0
    rows = (rows if len(rows) else rows.new_zeros(1, rows.shape[1])).to(place.device)
    logits = model(rows[:, :-1])
    return weight * F.cross_entropy(logits.flatten(0, 1).float(), rows[:, 1:].flatten(), reduction="sum")


def update(model: Any, optimizer: torch.optim.Optimizer, config: Config, rows: Tensor, place: Place) -> list[Tensor]:
    """One optimizer step on this rank's share of the global batch; its summed loss and the global gradient norm."""
    tokens = config.global_batch * config.context
    micro, count = config.micro_batch or max(len(rows), 1), rounds(config.global_batch, place.world, config.micro_batch)
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    for i in range(count):
        model.set_requires_gradient_sync(i == count - 1)
        loss = loss_sum(model, rows[i * micro : (i + 1) * micro], place)
        # FSDP averages over ranks; this makes the average the mean over all tokens, whatever each rank's share.
        (loss * (place.world / tokens)).backward()
        total += loss.detach()
    norm = optim.clip(model.parameters(), config.clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return [total, norm]


@contextmanager
def evaluation_mode(model: nn.Module, optimizer: Any):
    """Some optimizers (schedule-free) keep other parameters for evaluation than for training."""
    views = [x for x in (model, optimizer) if hasattr(x, "eval")]
    for view in views:
        view.eval()
    with torch.no_grad():
        yield
    for view in views:
        view.train()


def evaluate(model: nn.Module, optimizer: Any, config: Config, corpus: Corpus, place: Place) -> float:
    """Mean loss over the fixed validation windows, in nats a token; the same on every rank."""
    total = torch.zeros((), dtype=torch.float64, device=place.device)
    micro, count = (
        config.micro_batch or config.global_batch,
        rounds(config.global_batch, place.world, config.micro_batch),
    )
    with evaluation_mode(model, optimizer):
        for index in range(config.eval_batches):
            rows = eval_batch(corpus.val, config, index, place.rank, place.world)
            for i in range(count):
                total += loss_sum(model, rows[i * micro : (i + 1) * micro], place)
    dist.all_reduce(total)
    return total.item() / (place.tp * config.eval_batches * config.global_batch * config.context)


def reduce_step(total: Tensor, norm: Tensor, stop: bool, config: Config, place: Place) -> tuple[float, float, bool]:
    """Global mean loss, gradient norm, and whether any rank was asked to stop: one small all-reduce an update."""
    flat = torch.stack([total, torch.tensor(float(stop), dtype=torch.float64).to(total.device)])
    dist.all_reduce(flat)
    loss, stops = flat.tolist()
    return loss / (place.tp * config.global_batch * config.context), norm.item(), stops > 0


def train(
    model: nn.Module,
    optimizer: Any,
    schedule: LRScheduler,
    config: Config,
    corpus: Corpus,
    place: Place,
    checkpoints: Checkpoints,
    log: RunLog,
    step: int,
    stop: StopFlag,
) -> bool:
    """Run updates `step`+1 .. `config.steps`; True when they are all done, False when a signal ended them early."""
    bar = tqdm(
        total=config.steps, initial=step, disable=not place.first, mininterval=0.5 if sys.stderr.isatty() else 10
    )
    started, first, tokens = time.perf_counter(), step, config.global_batch * config.context
    state = validation = ""
    # Not the flag as it is here: a rank that alone leaves before the first update leaves the others waiting.
    asked = False
    while step < config.steps and not asked:
        lr = schedule.get_last_lr()[0]
        rows = train_batch(corpus.train, config, step, place.rank, place.world)
        total, norm = update(model, optimizer, config, rows, place)
        schedule.step()
        loss, grad_norm, asked = reduce_step(total, norm, stop.set, config, place)
        step += 1
        line = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm, "tokens": step * tokens}
        skipped = int(getattr(optimizer, "skipped_steps", 0))
        if skipped:
            line["skipped"] = skipped
        if step == config.steps or (config.eval_every and step % config.eval_every == 0):
            line["val_loss"] = evaluate(model, optimizer, config, corpus, place)
            validation = f"validation {line['val_loss']:.4f}, "
        log.write(**line, time=round(log.seconds + time.perf_counter() - started, 3))
        if checkpoints.due(step):
            checkpoints.save(step)
        state = state or f"{shardopt.state_bytes(optimizer).per_parameter:.2f} B/param"
        speed = (step - first) * tokens / (time.perf_counter() - started)
        bar.set_postfix_str(f"loss {loss:.4f}, {validation}{speed:,.0f} tokens/s, state {state}", refresh=False)
        bar.update()
    bar.close()
    checkpoints.save(step, blocking=True)
    checkpoints.wait()
    return step >= config.steps
