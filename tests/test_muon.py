"""Muon, NorMuon and AdaMuon: torch's, the papers' in float64, quantized momentum, safety; on one device."""

from dataclasses import replace

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from shardopt.state import STEP
from tests import muon_spec
from tests.table import gradients, weights

SHAPES = ((7, 15), (16, 17), (2, 16), (1, 1), (40, 3), (5, 3, 40), (66, 9, 3, 3), (128, 96))
DECAY = 0.13
SPEC = 1e-5  # of the tensor's norm: five float32 Newton-Schulz steps, each about 20 roundings deep

VARIANTS = {
    "muon": lambda: rules.Muon(lr=2e-2, momentum=0.93),
    "muon.plain": lambda: rules.Muon(lr=2e-2, momentum=0.9, nesterov=False),
    "muon.sum": lambda: rules.Muon(lr=3e-2, momentum=0.87, accumulate="sum"),
    "muon.sum.plain": lambda: rules.Muon(lr=3e-2, momentum=0.87, accumulate="sum", nesterov=False),
    "muon.rms": lambda: rules.Muon(lr=1e-2, adjust_lr="match_rms_adamw"),
    "muon.spectral": lambda: rules.Muon(lr=1e-2, adjust_lr="spectral"),
    "muon.rescale": lambda: rules.Muon(lr=1e-2, adjust_lr="rms_rescale"),
    "muon.none": lambda: rules.Muon(lr=1e-2, adjust_lr="none"),
    "normuon": lambda: rules.NorMuon(lr=2e-2, beta2=0.9, eps=1e-7),
    "normuon.rescale": lambda: rules.NorMuon(lr=2e-2, beta2=0.8, adjust_lr="rms_rescale"),
    "adamuon": lambda: rules.AdaMuon(lr=2e-2, momentum=0.9, beta2=0.93),
    "adamuon.identity": lambda: rules.AdaMuon(lr=2e-2, beta2=0.9, sign=False),
    "adamuon.atan2": lambda: rules.AdaMuon(lr=2e-2, beta2=0.9, atan2=True),
    "adamuon.clip": lambda: rules.AdaMuon(lr=2e-2, beta2=0.9, scale="clip", eps=1e-3),
}


def viewed(x):
    return x.flatten(1) if x.ndim == 4 else x


def relative(a, b, start):
    return float((a.double() - b).norm() / torch.maximum(b.norm(), start.double().norm()))


def draw(shapes, steps, seed=11):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(steps)]


def exact(rule):
    """The rule with nothing rounded on the way."""
    return replace(rule, wire="exact")


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_paper(name):
    """6 steps of every matrix. Kills: decay at the adjusted rate, a missing Nesterov term, rows and columns swapped in
    adjust_lr or row_sq, a stack or a convolution orthogonalized as one matrix of another view, o before the sign, a
    scale of the state that the update cancels."""
    rule = exact(VARIANTS[name]())
    shapes = [s for s in SHAPES if not (name == "adamuon.identity" and s == (1, 1))]
    params = [torch.nn.Parameter(weights(shape, seed=i)) for i, shape in enumerate(shapes)]
    fused = None if name.startswith("muon") else False  # kernels of its kin: test_kernel_muon_rows
    opt = ShardedOptimizer(params, Recipe(rule, "fp32", ("decay",)), weight_decay=DECAY, fused=fused)
    expected, states = [viewed(p.detach().double()) for p in params], [{} for _ in params]
    for gs in draw(shapes, 6):
        for p, g in zip(params, gs):
            p.grad = g.clone()
        opt.step()
        expected = [muon_spec.step(rule, e, viewed(g.double()), s, DECAY) for e, g, s in zip(expected, gs, states)]
    for i, (p, e, s) in enumerate(zip(params, expected, states)):
        assert relative(viewed(p.detach()), e, weights(shapes[i], seed=i)) < SPEC, shapes[i]
        parts = [part for part in opt.state[p] if part != STEP]
        for part, moment in zip(parts, s.values(), strict=True):
            stored = opt.state[p][part].reshape(moment.shape)
            assert relative(stored, moment, moment) < SPEC, (part, shapes[i])


@pytest.mark.parametrize("adjust", [None, "original", "match_rms_adamw"])
@pytest.mark.parametrize("nesterov", [True, False])
def test_equals_torch(nesterov, adjust):
    """torch.optim.Muon iterates in bfloat16: within what that loses. Kills: another momentum, another factor."""
    shapes = [(7, 15), (33, 64), (96, 40), (64, 64)]
    mine = [torch.nn.Parameter(weights(shape, seed=i)) for i, shape in enumerate(shapes)]
    theirs = [torch.nn.Parameter(weights(shape, seed=i)) for i, shape in enumerate(shapes)]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov, "adjust_lr_fn": adjust}
    a, b = shardopt.Muon(mine, state="fp32", wire="exact", **options), torch.optim.Muon(theirs, **options)
    for gs in draw(shapes, 10):
        for p, q, g in zip(mine, theirs, gs):
            p.grad, q.grad = g.clone(), g.clone()
        a.step()
        b.step()
    for i, (p, q) in enumerate(zip(mine, theirs)):
        moved = (q.detach() - weights(shapes[i], seed=i)).norm()
        assert float((p - q).detach().norm() / moved) < 0.03, shapes[i]


def test_a_checkpoint_of_torch_goes_on():
    """torch's momentum_buffer loads as it is. Kills: another name or scale of the momentum."""
    p, q = (torch.nn.Parameter(weights((33, 64))) for _ in range(2))
    theirs, ours = torch.optim.Muon([q], lr=0.02), shardopt.Muon([p], lr=0.02, state="fp32", wire="exact")
    gs = [g[0] for g in draw([(33, 64)], 6)]
    for g in gs[:3]:
        q.grad = g.clone()
        theirs.step()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        p.copy_(q)
    for g in gs[3:]:
        p.grad, q.grad = g.clone(), g.clone()
        ours.step()
        theirs.step()
    moved = (q.detach() - weights((33, 64))).norm()
    assert float((p - q).detach().norm() / moved) < 0.02


SPLITS = [(30, 12, "original"), ((20, 5, 5), 12, "original"), ((20, 5, 5), 12, "match_rms_adamw"), (6, 40, "spectral")]
SPLITS += [((4, 4, 22), 40, "rms_rescale"), (6, 3, "rms_rescale")]


@pytest.mark.parametrize("rule", [rules.Muon, rules.NorMuon, rules.AdaMuon])
@pytest.mark.parametrize("split, cols, adjust", SPLITS)
def test_blocks_are_matrices_of_their_own(split, cols, adjust, rule):
    """Heads and fused q, k, v. Kills: one polar factor of all rows, the factor of the whole matrix for every block, the
    norm of the whole restored or rescaled, which takes the factors of the blocks away again."""
    shape, options = (30, cols), {} if rule is rules.AdaMuon else {"adjust_lr": adjust}
    rule = rule(lr=2e-2, split=split, wire="exact", **options)
    p = torch.nn.Parameter(weights(shape))
    opt = ShardedOptimizer([p], Recipe(rule, "fp32"), fused=False)
    expected, state = p.detach().double(), {}
    for (g,) in draw([shape], 3):
        p.grad = g.clone()
        opt.step()
        expected = muon_spec.step(rule, expected, g.double(), state, 0.0)
    assert relative(p.detach(), expected, weights(shape)) < SPEC


@pytest.mark.parametrize("rule, options", [(rules.NorMuon, {}), (rules.AdaMuon, {"sign": False})])
def test_a_nan_stays_in_its_block(rule, options):
    """Kills: sums of blocks as a product with a matrix of 0 and 1."""
    p = torch.nn.Parameter(weights((30, 12)))
    p.grad = weights((30, 12))
    p.grad[7] = torch.nan
    ShardedOptimizer([p], Recipe(rule(lr=0.1, split=(4, 4, 22), wire="exact", **options), "fp32"), fused=False).step()
    assert p.detach().isnan().any(1).tolist() == [4 <= row < 8 for row in range(30)]


@pytest.mark.parametrize("what", ["zero", "rank one", "huge", "tiny", "nan"])
def test_inputs_that_hurt(what):
    """Kills: 0 / 0, squares that overflow or vanish, an update against the gradient, a NaN that spreads to others."""
    g = {
        "zero": torch.zeros(40, 64),
        "rank one": torch.randn(40, 1, generator=torch.Generator().manual_seed(1)) @ torch.ones(1, 64),
        "huge": weights((40, 64)) * 1e30,
        "tiny": weights((40, 64)) * 1e-30,
        "nan": torch.full((40, 64), torch.nan),
    }[what]
    p, q = (torch.nn.Parameter(torch.zeros(40, 64)) for _ in range(2))
    opt = shardopt.Muon([p, q], lr=0.1, weight_decay=0.0)
    p.grad, q.grad = g.clone(), weights((40, 64))
    opt.step()
    assert q.detach().isfinite().all() and float((q * q.grad).sum()) < 0
    if what == "zero":
        assert not p.detach().any()
    elif what == "nan":
        assert p.detach().isnan().all()
    else:
        cosine = -float((p.double() * g.double()).sum() / (p.double().norm() * g.double().norm()))
        assert p.detach().isfinite().all() and cosine > 0.2, cosine


def test_vectors_are_refused():
    """With the parameter's name and what to do. Kills: a vector taken for a matrix of one row."""
    layer = torch.nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"bias is a vector.*build_optimizer"):
        shardopt.Muon(layer.named_parameters())
    with pytest.raises(ValueError, match="which split=3 does not divide"):
        shardopt.Muon([layer.weight], split=3)


@pytest.mark.parametrize("rule", [rules.NorMuon, rules.AdaMuon])
@pytest.mark.parametrize("option, bad", [("beta2", 1.0), ("beta2", -0.1), ("eps", -1e-8)])
def test_numbers_of_the_kin_are_checked(rule, option, bad):
    """Kills: a second moment that never moves, in silence."""
    with pytest.raises(ValueError, match=option):
        rule(**{option: bad})


def test_scales_are_checked():
    """Kills: a misspelt scale taken for the other one."""
    with pytest.raises(ValueError, match="scale is 'rms'"):
        rules.AdaMuon(scale="rms")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"adjust_lr_fn": "half"}, "adjust_lr is 'half'"),
        ({"wire": "int9"}, "wire is 'int9'"),
        ({"wire": "int8+int9"}, "no codec is named 'int9'"),
        ({"mode": "somehow"}, "mode is 'somehow'"),
        ({"period": 3}, "no other mode any"),
        ({"mode": "periodic"}, "period=5"),
        ({"mode": "periodic", "period": 2.5}, "an integer above 1"),
        ({"wire": "int8+root4"}, "'root4' cannot be sent"),
        ({"orthogonalizer": "cans", "ns_steps": 4}, "both orthogonalizer='cans' and"),
        ({"momentum": 1.0}, "momentum is 1.0"),
    ],
)
def test_bad_options_say_what_to_do(options, words):
    with pytest.raises(ValueError, match=words):
        shardopt.Muon([torch.nn.Parameter(torch.zeros(8, 8))], **options)


def test_momentum_takes_a_byte():
    """Kills: a default momentum in fp32, blocks so small that scales weigh more than 2 %."""
    p = torch.nn.Parameter(torch.zeros(1024, 1024))
    opt = shardopt.Muon([p])
    assert shardopt.state_bytes(opt).per_parameter < 1.02
    assert opt.state[p]["momentum_buffer.int8"].dtype == torch.int8


def test_rows_of_normuon_are_one_number_each():
    p = torch.nn.Parameter(torch.zeros(64, 96))
    opt = shardopt.NorMuon([p])
    assert opt.state[p]["row_sq.rows"].shape == (64,)
    with pytest.raises(ValueError, match="state names row_sq"):
        shardopt.NorMuon([p], state={"row_sq": "int8"})


@pytest.mark.parametrize(
    "addons", [["cautious_decay"], ["mars", "decay"], ["cautious", "decay"], ["clip_by_global_norm"]]
)
@pytest.mark.parametrize("name", ["Muon", "NorMuon", "AdaMuon"])
def test_add_ons_and_low_precision_parameters(name, addons):
    """Whatever else a recipe does, Muon does it too: finite, moving, and the same again from a copy."""

    def run():
        p = torch.nn.Parameter(weights((70, 130)).bfloat16())
        fused = None if "mars" in addons else False
        opt = getattr(shardopt, name)([p], lr=0.02, addons=addons, rounding="stochastic", state="int8", fused=fused)
        for g in gradients((70, 130), 4):
            p.grad = g.bfloat16()
            opt.step()
        return p.detach()

    a, b = run(), run()
    assert a.isfinite().all() and a.equal(b) and not a.equal(weights((70, 130)).bfloat16())


def test_modes_that_need_a_gram_form():
    """Kills: "auto" that could only ever choose "full", "gram" that fails in the first step."""
    for mode in ("gram", "auto"):
        assert rules.Muon(mode=mode, orthogonalizer="minimax").mode == mode
        for options in ({}, {"orthogonalizer": "gram", "split": 4}):
            with pytest.raises(ValueError, match="needs a Gram form"):
                rules.Muon(mode=mode, **options)


def test_shapes_without_elements_and_lists():
    for shape in ((5, 0), (0, 5), (4, 0, 5)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.zeros(shape)
        for name in ("Muon", "NorMuon", "AdaMuon"):
            getattr(shardopt, name)([p]).step()
    assert rules.Muon(split=[6, 3]).split == (6, 3)
    for bad in (0, (4, 0), ()):
        with pytest.raises(ValueError, match="rows of a block"):
            rules.Muon(split=bad)
    with pytest.raises(ValueError, match="know no blocks"):
        rules.Muon(split=4, mode="local")
    group = [{"params": [torch.nn.Parameter(torch.zeros(8, 8))], "mode": "periodic", "period": 2}]
    assert shardopt.Muon(group).param_groups[0]["phase"] == 0


def test_rows_of_normuon_are_read_from_a_stock_checkpoint(tmp_path):
    """Without a manifest that tells the format. Kills: a format that only names chosen by users are looked up for."""
    saved, read = torch.nn.Linear(96, 64, bias=False), torch.nn.Linear(96, 64, bias=False)
    opt, other = (shardopt.NorMuon(model.parameters(), lr=0.02) for model in (saved, read))
    saved.weight.grad = weights((64, 96))
    opt.step()
    state = {"model": saved.state_dict(), "optim": get_optimizer_state_dict(saved, opt)}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    shardopt.load_checkpoint(tmp_path, read, other)
    for name, part in opt.state[saved.weight].items():
        assert other.state[read.weight][name].equal(part), name


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("rule", (rules.Muon, rules.NorMuon, rules.AdaMuon))
def test_a_broken_gradient_shows(rule, fused):
    """Kills: the sign of NaN, which torch calls 0: the run would go on with a momentum of NaN."""
    p = torch.nn.Parameter(torch.randn(64, 96))
    opt = ShardedOptimizer([p], Recipe(rule()), fused=fused)
    p.grad = torch.randn(64, 96)
    p.grad[3, 5] = float("nan")
    opt.step()
    assert p.isnan().any()
