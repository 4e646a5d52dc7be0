"""What wrong names and arguments are told: the known names, the nearest of them, and where torch.optim has no words."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from shardopt.addons import ClipByGlobalNorm
from shardopt.kernels import __main__ as kernels
from shardopt.plan import __main__ as plan
from shardopt.spelling import near


def one():
    return [nn.Parameter(torch.ones(64, 64))]


def muon(**options):
    return lambda: shardopt.Muon(one(), **options)


def adamw(**options):
    return lambda: shardopt.AdamW(one(), **options)


# what is made -> (a name that must be listed, the near one)
NEAR = {
    "orthogonalizer": (muon(orthogonalizer="newton_shulz"), "low_rank", "newton_schulz"),
    "with a dash": (muon(orthogonalizer="newton-schulz"), "low_rank", "newton_schulz"),
    "its options": (muon(orthogonalizer="newton_schulz(step=3)"), "safety", "steps"),
    "set": (muon(orthogonalizer="gram(coefficients='polar_expres')"), "cans", "polar_express"),
    "torch's set": (muon(ns_coefficients="quintik"), "cans", "quintic"),
    "norm": (muon(orthogonalizer="gram(norm='tigth')"), "frobenius", "tight"),
    "dtype": (muon(orthogonalizer="gram(dtype='fp23')"), "bf16", "fp32"),
    "wire": (muon(wire="int8-int4"), "exact", "int8+int4"),
    "half a wire": (muon(wire="int8+int5"), "fp8", "int8"),
    "mode": (muon(mode="fulll"), "periodic", "full"),
    "adjustment": (muon(adjust_lr_fn="match_rms_adam"), "spectral", "match_rms_adamw"),
    "scale": (lambda: shardopt.AdaMuon(one(), scale="clipp"), "rms_rescale", "clip"),
    "preset": (adamw(state="facored"), "bf16", "factored"),
    "codec": (adamw(state={"exp_avg": "itn8"}), "log16", "int8"),
    "codec's option": (adamw(state={"exp_avg": "int8(blok=64)"}), "block", "block"),
    "slot": (adamw(state={"exp_avgs": "int8"}), "exp_avg_sq", "exp_avg"),
    "add-on": (adamw(addons="cautios"), "orthograd", "cautious"),
    "rounding": (adamw(rounding="stochastics"), "kahan", "stochastic"),
    "nonfinite": (adamw(nonfinite="skipp"), "propagate", "skip"),
    "eps_mode": (lambda: shardopt.Adafactor(one(), eps_mode="ad"), "clamp", "add"),
    "count": (lambda: shardopt.Cautious(count="actve"), "all", "active"),
    "number": (lambda: ShardedOptimizer(one(), Recipe(rules.AdamW()), beta=0.9), "eps", "betas"),
    "optimizer": (lambda: shardopt.build_optimizer(nn.Linear(8, 8), "moun", lr=1.0), "lion", "muon"),
    "add-on's option": (adamw(addons="clip_by_global_norm(max_nrm=1)"), "max_norm", "max_norm"),
    "group's option": (lambda: shardopt.Muon([{"params": one(), "splitt": 32}]), "nothing reads", "split"),
    "group's number": (lambda: shardopt.Muon([{"params": one(), "weight_decy": 0}]), "nothing reads", "weight_decay"),
    "role's option": (
        lambda: shardopt.build_optimizer(nn.Linear(8, 8), lr=1.0, vector_beta=1),
        "nesterov",
        "betas",
    ),
}


@pytest.mark.parametrize("name", NEAR)
def test_a_wrong_name_is_told_the_known_ones_and_the_nearest(name):
    """Kills: a message without the list, a suggestion left out or not the nearest."""
    make, listed, wanted = NEAR[name]
    with pytest.raises(ValueError) as error:
        make()
    text = str(error.value)
    assert listed in text and text.endswith(f"; did you mean {wanted!r}?")


def test_a_name_that_is_like_none_is_told_no_other():
    """Kills: a suggestion at any price; case that hides what was meant."""
    assert near("xyz", ["int8", "fp32"]) == near(3, ["int8"]) == near("", []) == ""
    assert near("newtonschulz", ["NewtonSchulz", "Gram"]) == "; did you mean 'NewtonSchulz'?"
    with pytest.raises(ValueError, match="no orthogonalizer is named 'zzz'") as error:
        muon(orthogonalizer="zzz")()
    assert "did you mean" not in str(error.value)
    with pytest.raises(ValueError, match=r"takes none .*write gram"):
        muon(orthogonalizer="minimax(steps=3)")()


def test_commands_too(capsys):
    assert plan.main(["--model", "lama3-8b"]) == kernels.main(["build", "--state", "inte8"]) == 2
    assert capsys.readouterr().err.count("did you mean") == 2


CALLS = {
    "AdamW": (lambda: shardopt.AdamW(one(), beta1=0.9), "AdamW() got an unexpected keyword argument 'beta1'", "betas"),
    "NorMuon": (lambda: shardopt.NorMuon(one(), wires="x"), "NorMuon() got an unexpected keyword argument", "wire"),
    "SGD": (lambda: shardopt.SGD(one(), momentun=0.9, x=1), "SGD() got unexpected keyword arguments 'mo", "momentum"),
}


@pytest.mark.parametrize("name", CALLS)
def test_unexpected_options_name_the_class_that_was_called(name):
    """With all that it takes. Kills: the base class's name, options of another class, arguments between classes."""
    make, words, wanted = CALLS[name]
    with pytest.raises(TypeError) as error:
        make()
    text = str(error.value)
    assert text.startswith(words) and text.endswith(f"did you mean {wanted!r}?")
    takes = text.partition("it takes ")[2].partition(";")[0].split(", ")
    assert {"lr", "weight_decay", "state", "nonfinite", "foreach", wanted} <= set(takes)
    assert not {"self", "params", "rule", "decay", "more", "options", "unknown"} & set(takes)
    assert ("wire" in takes, "beta2" in takes, "nesterov" in takes) == (name == "NorMuon", name == "NorMuon", True)


def test_adamw_with_coupled_decay_is_adam():
    """Kills: a TypeError about two values of an option."""
    with pytest.raises(ValueError, match="Adam has the coupled one"):
        shardopt.AdamW(one(), decoupled_weight_decay=False)
    assert shardopt.AdamW(one(), decoupled_weight_decay=True).recipes == shardopt.AdamW(one()).recipes


def test_parameters_that_are_none_or_twice():
    """Kills: a generator that was read before without a word of it, a parameter stepped twice."""
    (p,), (q,) = one(), one()
    used = iter([p])
    list(used)
    for params, words in ((used, "can be read only once"), ([], "list held none$"), (iter(()), "only once")):
        with pytest.raises(ValueError, match=f"empty parameter list.*{words}"):
            shardopt.AdamW(params)
    with pytest.raises(ValueError, match=r"b, of shape \(64, 64\), appears twice in one param group, before as a"):
        shardopt.AdamW([("a", p), ("c", q), ("b", p)])
    with pytest.raises(ValueError, match=r"params\[1\], .* more than one parameter group: it is in param group 0"):
        shardopt.AdamW([{"params": p}, {"params": iter([q, p])}])
    with pytest.raises(TypeError, match=r"the module Linear; give its parameters"):
        shardopt.AdamW(nn.Linear(3, 3))
    with pytest.raises(TypeError, match="params is a mapping"):
        shardopt.AdamW({"a": p})
    assert len(shardopt.AdamW(x for x in (p, q)).param_groups[0]["params"]) == 2


def stepped(lr, later=False):
    (p,) = one()
    opt = shardopt.AdamW([p], lr=torch.tensor(1e-3) if later else lr)
    p.grad = torch.ones_like(p)
    if later:
        opt.step()
        opt.param_groups[0]["lr"] = lr
    opt.step()
    return p


@pytest.mark.parametrize("later", [False, True])
def test_rates_that_are_tensors(later):
    """One number, where it can be read. Kills: torch's words about scalars; a look at the type of lr alone."""
    for lr, words in (
        (torch.tensor([0.1, 0.2]), r"param group( 0)? has an lr tensor of shape \(2,\); it must hold one number"),
        (torch.empty(0), r"shape \(0,\)"),
        (torch.tensor(0.1, device="meta"), "on meta and parameters on cpu"),
    ):
        with pytest.raises(ValueError, match=words):
            stepped(lr, later)
    assert stepped(torch.tensor([0.1]), later).equal(stepped(torch.tensor(0.1), later))
    if not later:
        for lr in (-1.0, float("nan")):
            with pytest.raises(ValueError, match="must be in"):
                shardopt.AdamW(one(), lr=torch.tensor(lr))


def test_a_rate_that_groups_share_is_told():
    lr = torch.tensor(0.5)
    shared = shardopt.AdamW([{"params": one()}, {"params": one()}], lr=lr)
    assert "lr 0.5 (one tensor with group 1), weight_decay" in shared.explain()
    assert "one tensor" not in shardopt.AdamW([{"params": one()}, {"params": one()}], lr=0.5).explain()


def test_options_of_addons_are_written_as_codecs_are():
    """Kills: options that are dropped, a comma of an option that parts two add-ons."""
    text = Recipe(rules.AdamW(), addons="cautious(count='all', floor=0.5), clip_by_global_norm(max_norm=0.5)")
    objects = Recipe(rules.AdamW(), addons=[shardopt.Cautious(count="all", floor=0.5), ClipByGlobalNorm(max_norm=0.5)])
    assert text == objects


def test_a_group_may_hold_what_its_user_wants():
    """Kills: every unknown key refused, as torch refuses none."""
    group = {
        "params": one(),
        "name": "body",
        "lr_scale": 0.1,
        "initial_lr": 1.0,
        "max_momentum": 0.9,
        "base_momentum": 0.8,
    }
    assert shardopt.AdamW([group], lr=1e-3).param_groups[0]["lr_scale"] == 0.1


@pytest.mark.parametrize(
    "make, words",
    [
        (adamw(fused="yes"), "fused is 'yes'; it must be None, True or False"),
        (adamw(betas=0.9), "betas is 0.9; it must have 2 numbers"),
        (adamw(lr=torch.ones(2)), "an lr tensor of shape \\(2,\\)"),
        (lambda: shardopt.roles(nn.Linear(8, 8), {"weigh": "matrix"}), "a pattern is of whole names"),
        (lambda: shardopt.save_checkpoint(nn.Linear(8, 8), None, "folder", step=1), "path is a Linear"),
        (lambda: shardopt.save_checkpoint("folder", None, nn.Linear(8, 8), step=1), "model is a NoneType"),
    ],
)
def test_what_is_of_another_kind_is_refused_with_words(make, words):
    """Kills: Python's own TypeError from within, and an error in the first step only."""
    with pytest.raises(ValueError, match=words):
        make()
