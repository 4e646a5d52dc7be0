"""Resuming with other options: what gives stored state its meaning must match, the rest changes with one warning."""

import copy
import warnings

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, get_optimizer_state_dict

import shardopt
from shardopt.dtensor import loading
from shardopt.rules import Hyper
from tests.checkpoint_kit import settled  # noqa: F401
from tests.threaded import run_threaded

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
SHAPES = ((40, 130), (40, 64))
CHANGES = {  # optimizer, its options when it saves, those that differ when it loads; in the group's names if others
    "wire": ("Muon", {}, {"wire": "bf16"}),
    "mode": ("Muon", {"orthogonalizer": "gram", "mode": "auto"}, {"mode": "full"}),
    "period": ("Muon", {}, {"mode": "periodic", "period": 2}),
    "orthogonalizer": ("Muon", {"orthogonalizer": "cans"}, {"orthogonalizer": "newton_schulz(steps=4)"}),
    "adjust_lr": ("Muon", {}, {"adjust_lr_fn": "match_rms_adamw"}),
    "nesterov and split": ("NorMuon", {"split": (30, 3, 7)}, {"nesterov": False, "split": None}),
    "sign": ("AdaMuon", {}, {"sign": False, "scale": "clip"}),
    "adam": ("AdamW", {"nesterov": True}, {"nesterov": False, "atan2": True, "bias_correction": False}),
    "sgd": ("SGD", {"momentum": 0.9}, {"nesterov": True}),
    "rmsprop": ("RMSprop", {}, {"bias_correction": True}),
    "adafactor": ("Adafactor", {"beta1": 0.9}, {"decay": "scaled", "eps_mode": "add", "scale_parameter": False}),
    "add-ons": ("AdamW", {"addons": ["cautious"]}, {"addons": ["grams", "decay"]}),
    "writing": ("Lion", {}, {"rounding": "stochastic", "update_from": "stored"}),
}
MEANINGS = {
    "accumulate": ("Muon", {"accumulate": "sum", "wire": "bf16"}, {"accumulate": "ema"}),
    "centered": ("RMSprop", {"centered": True}, {"centered": False}),
    "momentum": ("Adafactor", {"beta1": 0.9}, {"momentum": "raw"}),
}


CASES = [(name, how) for name in CHANGES for how in ("ours", "state dict")]
CASES += [("nesterov and split", "stock"), ("nesterov and split", "flat")]


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.ps = nn.ParameterList(torch.zeros(shape) for shape in SHAPES)


def job(name, steps=0, **options):
    model = Two()
    opt = getattr(shardopt, name)(model.parameters(), lr=0.01, fused=False, **options)
    train(model, opt, 0, steps)
    return model, opt


def train(model, opt, first, last):
    for step in range(first, last):
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
        opt.step()


def load(how, path, saved, target):
    """`saved` = (model, optimizer) into `target`; returns what was said about options."""
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if how == "state dict":
            target[0].load_state_dict(saved[0].state_dict())
            target[1].load_state_dict(copy.deepcopy(saved[1].state_dict()))
        else:
            shardopt.load_checkpoint(path, *target)
    return [str(warning.message) for warning in told if "saved with" in str(warning.message)]


def save(how, path, model, opt):
    if how == "ours":
        shardopt.save_checkpoint(path, model, opt, step=2)
    elif how != "state dict":
        options = StateDictOptions(flatten_optimizer_state_dict=how == "flat")
        optim = get_optimizer_state_dict(model, opt, options=options)
        dcp.save({"model": get_model_state_dict(model), "optim": optim}, checkpoint_id=path)


@pytest.mark.parametrize("name, how", CASES)
def test_what_state_does_not_mean_may_change_with_one_warning(tmp_path, name, how):
    """Kills: a refusal; an option that is adopted from the checkpoint, in the group's numbers only; silence; a warning
    a group or a parameter; one where nothing changed."""
    rule, before, after = CHANGES[name]
    saved, target = job(rule, 2, **before), job(rule, **{**before, **after})
    group = copy.deepcopy({key: value for key, value in target[1].param_groups[0].items() if key != "params"})
    save(how, tmp_path, *saved)
    (told,) = load(how, tmp_path, saved, target)
    assert told.count("param group 0") == 1
    for option, value in after.items():
        if option not in ("update_from", "addons"):
            assert f"{'adjust_lr' if option == 'adjust_lr_fn' else option}={value!r}" in told.split("; here it has")[1]
    found = target[1].param_groups[0]
    numbers = {key: value for key, value in found.items() if key in group}
    assert numbers == {**group, "lr": 0.01}
    for p, q in zip(saved[0].parameters(), target[0].parameters()):
        mine = target[1].state[q]
        assert all(torch.equal(x, mine[part]) for part, x in saved[1].state[p].items() if part in mine)
    train(*target, 2, 3)
    again = job(rule, **{**before, **after})
    save(how, tmp_path / "again", *target)
    assert not load(how, tmp_path / "again", target, again)


@pytest.mark.parametrize("how", ["ours", "state dict", "stock", "flat"])
@pytest.mark.parametrize("name", MEANINGS)
def test_what_state_means_must_match(tmp_path, name, how):
    """Before anything is changed, also where groups tell of no switches. Kills: a buffer of sums taken for means."""
    rule, before, after = MEANINGS[name]
    saved, target = job(rule, 2, **before), job(rule, 1, **{**before, **after})
    for group in saved[1].param_groups:
        group.pop(name)  # its recipe's key still says it
    parts = copy.deepcopy([target[1].state[p] for p in target[0].parameters()])
    save(how, tmp_path, *saved)
    was = getattr(saved[1].recipes[0].rule, name)
    with pytest.raises(
        ValueError, match=f"saved with {name}={was}, here it is {after[name]}.*Build the optimizer with"
    ):
        load(how, tmp_path, saved, target)
    for p, kept in zip(target[0].parameters(), parts):
        assert all(torch.equal(x, target[1].state[p][part]) for part, x in kept.items())


@pytest.mark.parametrize("how", ["stock", "state dict"])
def test_torchs_muon_is_compared_by_its_own_options(tmp_path, how):
    """Kills: ns_steps and ns_coefficients ignored, or kept; an EMA taken for a sum; a warning about eps."""
    other = {"ns_steps": 6, "ns_coefficients": (3.0, -3.2, 1.2), "adjust_lr_fn": "match_rms_adamw"}
    model = Two()
    opt = torch.optim.Muon(model.parameters(), lr=0.01, **other)
    train(model, opt, 0, 2)
    save(how, tmp_path, model, opt)
    target = job("Muon", state="fp32")
    (told,) = load(how, tmp_path, (model, opt), target)
    text = "newton_schulz(coefficients=(3.0, -3.2, 1.2), steps=6)"
    assert f'orthogonalizer="{text}"' in told or f"orthogonalizer='{text}'" in told
    assert "adjust_lr='match_rms_adamw'; here it has" in told and "the same lr means another step" in told
    assert not set(other) & set(target[1].param_groups[0])
    for options in (other, {"orthogonalizer": text, "adjust_lr_fn": "match_rms_adamw"}):
        assert not load(how, tmp_path, (model, opt), job("Muon", state="fp32", eps=1e-9, **options))
    with pytest.raises(ValueError, match=r"saved with accumulate=ema, here it is sum.*with accumulate='ema'"):
        load(how, tmp_path, (model, opt), job("Muon", state="fp32", accumulate="sum"))


def test_rank_0_says_it(monkeypatch):
    """Kills: the same warning from every rank; from none."""
    said = []
    monkeypatch.setattr(loading, "tell", said.append)
    run_threaded(3, lambda rank: job("AdamW", atan2=True)[1].load_state_dict(job("AdamW", 1)[1].state_dict()))
    assert len(said) == 1 and "atan2=False; here it has atan2=True" in said[0]


def test_other_decay_and_structure_of_a_state_dict():
    """Kills: a decay of another kind in silence; a beta2 of None adopted by a rule that reads it in every step."""
    saved = job("Adam", 1, weight_decay=0.1)
    (told,) = load("state dict", None, saved, job("AdamW"))
    assert "weight_decay 0.1, coupled (l2), here it is decoupled" in told
    with pytest.raises(ValueError, match=r"'beta2': None.*Build the optimizer with the saved numbers"):
        load("state dict", None, job("Adafactor", 1), job("Adafactor", beta2=0.99))


OTHERS = {
    "AdamW into Adafactor": ("AdamW", {}, "Adafactor", {}),
    "Adafactor into AdamW": ("Adafactor", {}, "AdamW", {}),
    "Lion into Muon": ("Lion", {}, "Muon", {}),
    "Muon into NorMuon": ("Muon", {}, "NorMuon", {}),
    "SGD into Muon": ("SGD", {"momentum": 0.9}, "Muon", {"state": "fp32"}),
    "SGD into Adafactor": ("SGD", {"momentum": 0.9}, "Adafactor", {}),
    "Muon into SGD": ("Muon", {}, "SGD", {"momentum": 0.9, "state": "fp32"}),
    "SGD into its nesterov": ("SGD", {}, "SGD", {"nesterov": True, "momentum": 0.9}),
}


@pytest.mark.parametrize("how", ["ours", "state dict", "stock", "torchs", "torchs state dict"])
@pytest.mark.parametrize("pair", OTHERS)
def test_another_rule_is_refused_in_words(tmp_path, pair, how):
    """Kills: numbers of another rule's group that reach this rule's checks, or its TypeErrors, first; a buffer of
    torch's SGD taken for Muon's because it has the same name; "build the optimizer with momentum=0.9" of Adafactor."""
    theirs, before, ours, after = OTHERS[pair]
    if how.startswith("torchs") and not hasattr(torch.optim, theirs):
        pytest.skip("not one of torch's")
    saved = job(theirs, 2, **before)
    if how.startswith("torchs"):
        saved[0].zero_grad()
        saved = (saved[0], getattr(torch.optim, theirs)(saved[0].parameters(), **before))
        train(*saved, 0, 2)
    how = how.removeprefix("torchs ").replace("torchs", "stock")
    save(how, tmp_path, *saved)
    with pytest.raises(ValueError, match=r"saved with|saved by|is not in|this optimizer stores") as told:
        load(how, tmp_path, saved, job(ours, 1, **after))
    assert "Build" in str(told.value) or "optimizer that saved it" in str(told.value)
    assert "with momentum=0.9" not in str(told.value)


@pytest.mark.parametrize("how", ["ours", "state dict"])
def test_the_place_in_a_period_stays_with_its_mode(tmp_path, how):
    """Kills: a phase in groups that count none; a place beyond a shorter period, after which two steps are local."""
    saved = job("Muon", 3, mode="periodic", period=4)
    save(how, tmp_path, *saved)
    whole, shorter = job("Muon"), job("Muon", mode="periodic", period=3)
    for target in (whole, shorter):
        load(how, tmp_path, saved, target)
    assert "phase" not in whole[1].param_groups[0]
    assert shorter[1].param_groups[0]["phase"] == 3
    rule = shorter[1].recipes[0].rule
    asked = rule.asked(torch.ones(40, 130), Hyper(shorter[1].param_groups[0], shape=(40, 130)))
    assert asked.mode == "full"
