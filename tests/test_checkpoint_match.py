"""What does not match is refused in words; what may differ loads; what a checkpoint tells."""

import json

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import shardopt
from shardopt.checkpoint_info import main as info
from shardopt.dtensor import checkpoint, record
from shardopt.rules import Lion
from tests.checkpoint_kit import BF16, FP32, damage, job, three, torchs, tree
from tests.resume_job import (
    Odd,
    build,
    check_equal,
    contents,
    numbers,
    optimizer,
    train,
)

# --- what does not match, and what may


def test_bad_arguments(tmp_path):
    model, opt = job()
    for options, words in (
        ({"step": -1}, "at least 0"),
        ({"step": "7"}, "integer"),
        ({"step": True}, "integer"),
        *(({"step": 1, "keep": keep}, "keep.*integer of at least 1") for keep in (0, True, 1.5, "3")),
        *(({"step": 1, "extra": extra}, "must be a dict") for extra in ([1], [], "x", 3)),
        ({"step": 1, "extra": {"step": 3}}, "key 'step'"),
        ({"step": 1, "extra": {"x": torch.ones(1)}}, "JSON"),
    ):
        with pytest.raises(ValueError, match=words):
            shardopt.save_checkpoint(tmp_path, model, opt, **options)
    for options, words in (
        ({"step": "last"}, "'latest' or an integer"),
        ({"step": 3}, "no checkpoint of step 3.*none"),
    ):
        with pytest.raises(ValueError, match=words):
            shardopt.load_checkpoint(tmp_path, model, opt, **options)
    with pytest.raises(ValueError, match="has not"):
        shardopt.save_checkpoint(tmp_path, nn.Linear(2, 2), opt, step=1)
    with torch.device("meta"):
        meta = Odd()
    with pytest.raises(ValueError, match="after to_empty"):
        shardopt.save_checkpoint(tmp_path, meta, shardopt.AdamW(meta.parameters()), step=1)
    assert not any(tmp_path.iterdir())
    folder = shardopt.save_checkpoint(tmp_path, model, opt, step=1).wait()
    assert shardopt.load_checkpoint(folder, model, opt, step=1)["step"] == 1
    with pytest.raises(ValueError, match="of step 1, not of step 2"):
        shardopt.load_checkpoint(folder, model, opt, step=2)
    with pytest.raises(ValueError, match="after to_empty"):
        shardopt.load_checkpoint(tmp_path, meta, shardopt.AdamW(meta.parameters()))


class Grown(Odd):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(64, 64)


def test_missing_parameters_start_fresh_with_one_warning(tmp_path):
    model, opt = job("int8+log8", FP32, 3)
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    other = build("alone", dtype=FP32, model=Grown)
    target = optimizer(other, "int8+log8")
    train(other, target, 10, 12)  # what it has of the head is not a fresh state
    weight = other.head.weight.clone()
    with pytest.warns(UserWarning) as told:
        shardopt.load_checkpoint(tmp_path, other, target)
    (message,) = [str(w.message) for w in told if "lacks" in str(w.message)]
    assert "head.weight (the model's)" in message and "head.bias (its optimizer state)" in message
    assert torch.equal(other.head.weight, weight)
    state = target.state[other.head.weight]
    assert all(not x.any() for name, x in state.items() if name != "key")
    assert torch.equal(target.state[other.tall]["exp_avg.int8"], opt.state[model.tall]["exp_avg.int8"])


def test_what_the_checkpoint_alone_has_is_named_once(tmp_path):
    """Kills: parameters of a larger model, or state of a larger optimizer, dropped in silence; one named twice."""
    large = build("alone", dtype=FP32, model=Grown)
    shardopt.save_checkpoint(tmp_path, large, optimizer(large, "fp32"), step=0)
    part = shardopt.AdamW([p for name, p in large.named_parameters() if "head" not in name], state="fp32")
    for model, opt, its_state in ((*job("fp32"), False), (large, part, True)):
        with pytest.warns(UserWarning) as told:
            shardopt.load_checkpoint(tmp_path, model, opt)
        (message,) = [str(w.message) for w in told if "holds" in str(w.message)]
        assert message.count("head.weight") == message.count("head.bias") == 1 and "tall" not in message
        assert ("its optimizer state" in message) == its_state


def test_state_of_a_frozen_parameter_is_restored(tmp_path):
    """Kills: the state of a parameter that is frozen at load lost until it thaws."""
    model, opt = job("int8+log8", FP32, 3)
    shardopt.save_checkpoint(tmp_path, model, opt, step=3)
    for rule in (Lion(), None):
        other = build("alone", dtype=FP32)
        other.tall.requires_grad_(False)
        target = optimizer(other, "int8+log8" if rule is None else "fp32", rule)
        if rule:
            with pytest.raises(ValueError, match="another rule"):
                shardopt.load_checkpoint(tmp_path, other, target)
            assert other.tall not in target.state
    shardopt.load_checkpoint(tmp_path, other, target)
    other.tall.requires_grad_(True)
    check_equal(contents(other, target), contents(model, opt))


def test_recipes_are_looked_up_once(tmp_path, monkeypatch):
    """Kills: time quadratic in the number of groups."""
    model, opt = job("fp32", FP32, 1)
    names, _ = record.optimizer_state(model, opt)
    looks, recipes = [], shardopt.ShardedOptimizer.recipes.fget
    monkeypatch.setattr(shardopt.ShardedOptimizer, "recipes", property(lambda self: looks.append(1) or recipes(self)))
    record.record_of(opt, names)
    assert len(looks) == 1


def test_another_shape_is_refused(tmp_path):
    class Other(Odd):
        def __init__(self):
            super().__init__()
            self.tall = nn.Parameter(torch.zeros(71, 130))

    shardopt.save_checkpoint(tmp_path, *job(), step=0)
    model = Other()
    with pytest.raises(ValueError, match=r"tall has shape \(70, 130\).*\(71, 130\)"):
        shardopt.load_checkpoint(tmp_path, model, shardopt.AdamW(model.parameters()))


def test_groups_frozen_and_tied_parameters(tmp_path):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.head = nn.Embedding(64, 80), nn.Linear(80, 64, bias=False)
            self.frozen = nn.Parameter(torch.ones(5), requires_grad=False)
            self.head.weight = self.embed.weight
            self.register_buffer("count", torch.tensor(3))

    def make():
        model = Tied()
        with torch.no_grad():
            model.embed.weight.copy_(numbers("embed", (64, 80), -1))
        lr = torch.tensor(3e-3)
        groups = [{"params": [model.embed.weight], "lr": lr}, {"params": [model.frozen], "lr": 1e-4, "note": "mine"}]
        return model, shardopt.AdamW(groups, betas=(0.5, 0.9))

    model, opt = make()
    model.embed.weight.grad = numbers("embed", (64, 80), 1)
    opt.step()
    opt.param_groups[0]["lr"].fill_(7e-3)
    opt.param_groups[1].update(lr=2e-4, initial_lr=1.0)
    model.count += 1
    shardopt.save_checkpoint(tmp_path, model, opt, step=1)
    other, target = make()
    rate = target.param_groups[0]["lr"]
    shardopt.load_checkpoint(tmp_path, other, target)
    assert target.param_groups[0]["lr"] is rate and float(rate) == pytest.approx(7e-3)
    second = target.param_groups[1]
    assert (second["lr"], second["initial_lr"], second["note"], second["betas"]) == (2e-4, 1.0, "mine", (0.5, 0.9))
    assert other.count == 4 and other.head.weight is other.embed.weight
    for model_, opt_ in ((model, opt), (other, target)):
        model_.embed.weight.grad = numbers("embed", (64, 80), 2)
        opt_.step()
    assert torch.equal(model.embed.weight, other.embed.weight)


def test_loading_keeps_storages(tmp_path):
    model, opt = job("int8+log8", BF16, 2)
    shardopt.save_checkpoint(tmp_path, model, opt, step=2)
    for state in ("int8+log8", "fp32"):
        other, target = job(state, BF16)
        places = {id(x): x.data_ptr() for p in other.parameters() for x in (p, *target.state[p].values())}
        shardopt.load_checkpoint(tmp_path, other, target)
        assert places == {id(x): x.data_ptr() for p in other.parameters() for x in (p, *target.state[p].values())}


# --- what it tells


def test_the_manifest_and_the_command(tmp_path, capsys):
    model, opt = job("int8+log8", BF16, 2, "stochastic")
    folder = shardopt.save_checkpoint(tmp_path, model, opt, step=2, extra={"tokens": 7}).wait()
    told = json.loads((folder / "manifest.json").read_text())
    assert told["format"] == 1 and told["extra"] == {"tokens": 7}
    assert told["recipes"][0]["key"] == "adamw/int8,log8/decay/stochastic"
    assert told["parameters"]["tall"]["slots"] == {"exp_avg": "int8", "exp_avg_sq": "log8"}
    assert told["parameters"]["vector"]["slots"] == {"exp_avg": "fp32", "exp_avg_sq": "fp32"}
    assert set(told["files"]) == {"__0_0.distcp", ".metadata"}
    for path in (tmp_path, folder):
        assert info([str(path), "--verify"]) == 0
        out = capsys.readouterr().out
        for words in ("adamw/int8,log8/decay/stochastic", "exp_avg_sq.log8", "uint8", "tall", "B/param", "tokens"):
            assert words in out
    damage(folder / "__0_0.distcp", "flipped")
    assert info([str(folder), "--verify"]) == 1
    assert "__0_0.distcp is corrupt" in capsys.readouterr().err
    assert info([str(tmp_path / "none")]) == 2
    dcp.save(tree(*torchs(1)), checkpoint_id=tmp_path / "foreign")
    assert info([str(tmp_path / "foreign")]) == 0
    assert "exp_avg_sq" in capsys.readouterr().out


def test_versions_to_come_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FORMAT", 99)
    shardopt.save_checkpoint(tmp_path, *job(), step=1)
    with pytest.raises(ValueError, match=r"format 99.*install"):
        shardopt.load_checkpoint(tmp_path, *job())


def test_large_checkpoints_are_not_hashed_again_unless_asked(tmp_path, monkeypatch):
    three(tmp_path)
    damage(tmp_path / "step_00000003" / "__0_0.distcp", "flipped")
    monkeypatch.setattr(checkpoint, "VERIFIED_BYTES", 1)
    assert shardopt.load_checkpoint(tmp_path, *job())["step"] == 3
    with pytest.warns(UserWarning, match="corrupt"):
        assert shardopt.load_checkpoint(tmp_path, *job(), verify=True)["step"] == 2
