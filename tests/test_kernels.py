"""Kernels compute what the reference computes: over the table, on ugly inputs; and they are what ran."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt import addons, rules
from shardopt.kernels import NoTwin, key_at, key_of
from shardopt.recipe import Recipe
from tests.kernel_kit import differences, native_cases, optimizer_of, stepped
from tests.table import DTYPES, SHAPES, Case

pytestmark = pytest.mark.shipped
CASES = list(native_cases())


def test_the_cover_is_wide():
    """About 150 keys; every rule, format, add-on, write policy and dtype that has a twin is among them."""
    texts = " ".join(key_at(c.recipe(), c.shape, DTYPES[c.dtype], g).cpp for c, g in CASES)
    items = (
        "AdamW Lion SGD RMSprop Fp32 Bf16 Fp16 Int8 Sqrt8 Root4 Fp8 Int4 Dyn4 Dyn8 Log8 Log16 Log4 ClipByGlobalNorm "
        "CoupledDecay Grams WeightDecay CautiousDecay Nearest Stochastic Kahan F32 BF16 F16"
    )
    assert [item for item in items.split() if item not in texts] == []
    assert len(CASES) > 140 and {case.shape for case, _ in CASES} == set(SHAPES)


@pytest.mark.parametrize("case, gradient", CASES, ids=[f"{c.name()}-{str(g)[6:]}" for c, g in CASES])
def test_equals_the_reference(case, gradient):
    """Kills: every wrong constant, order of operations, tail, block boundary, noise key or step count in a twin.

    Bit by bit, but for what goes through log2, pow or atan2, where the two sides may round another way: one code in
    10,000 (two of the small tensors here), and the one ulp that follows from it.
    """
    found = differences(stepped(case, gradient, fused=False), stepped(case, gradient, fused=True))
    transcendental = "log" in case.state or "atan2" in case.rule
    if not transcendental:
        assert not found
    for difference in found:
        assert difference.elements <= 2 or difference.largest < 1e-6, found


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("state", ["fp32", "int8", "int4", "fp8", "bf16", "fp16", "dyn8", "log8"])
def test_what_is_not_finite_spoils_the_same_elements(state, bad):
    """Kills: a maximum that drops NaN, a conversion of NaN that is another code, a block spoilt beside its own."""

    def run(fused, nonfinite):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(8, 1024))
        formats = {"exp_avg_sq": "log8"} if state == "log8" else state
        opt = shardopt.AdamW([p], lr=1e-2, state=formats, fused=fused, nonfinite=nonfinite)
        for _ in range(3):
            p.grad = torch.randn(8, 1024)
            p.grad[2, 700] = bad
            opt.step()
        return {"p": p.detach(), **opt.state[p]}

    for nonfinite in ("propagate", "zero"):
        kernel = run(True, nonfinite)
        assert differences(run(False, nonfinite), kernel) == []
        spoilt = ~kernel["p"].isfinite()
        assert not spoilt[:2].any() and bool(spoilt.any()) == (nonfinite == "propagate")


@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e12, 1e18])
def test_gradients_of_any_size(scale):
    """Kills: a reciprocal that overflows, subnormal numbers treated as zero."""
    case = Case("adamw", "sqrt8+root4", "decay", "nearest", "fp32", "fresh", (12, 512))

    def run(fused):
        opt = optimizer_of(case, torch.float32, torch.float32, fused=fused)
        (p,) = opt.param_groups[0]["params"]
        for seed in range(4):
            torch.manual_seed(seed)
            p.grad = torch.randn(12, 512) * scale
            opt.step()
        return {"p": p.detach(), **opt.state[p]}

    assert differences(run(False), run(True)) == []


def test_options_of_the_step():
    """maximize, non-contiguous gradients, several groups with other numbers, tensor lr, bf16 beside fp32: one step
    of all. Kills: numbers of another group, a stride ignored, a sign."""

    def run(fused):
        torch.manual_seed(1)
        params = [nn.Parameter(torch.randn(70, 130).to(d)) for d in (torch.float32, torch.bfloat16, torch.float32)]
        groups = [
            {"params": params[:2], "lr": torch.tensor(1e-2)},
            {"params": params[2:], "lr": 3e-3, "betas": (0.8, 0.9), "maximize": True, "weight_decay": 0.0},
        ]
        opt = shardopt.AdamW(groups, weight_decay=0.1, rounding="stochastic", fused=fused)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(130, 70).to(p.dtype).t()
            opt.step()
        return {f"{i} {name}": t for i, p in enumerate(params) for name, t in {"p": p.detach(), **opt.state[p]}.items()}

    assert differences(run(False), run(True)) == []


def test_groups_of_one_kernel_have_their_own_numbers():
    """Two limits of the norm, one C++ type. Kills: the numbers of an add-on taken from another group's recipe."""

    def run(fused):
        torch.manual_seed(4)
        params = [nn.Parameter(torch.randn(64, 64)) for _ in range(2)]
        groups = [{"params": [p], "addons": [addons.ClipByGlobalNorm(max_norm=n)]} for p, n in zip(params, (0.1, 9.0))]
        opt = shardopt.SGD(groups, lr=0.1, fused=fused)
        for p in params:
            p.grad = torch.randn(64, 64)
        opt.step()
        assert not fused or len(opt.native.ran) == 1
        return {str(i): p.detach() for i, p in enumerate(params)}

    assert differences(run(False), run(True)) == []


def test_grad_scaler_and_skipped_steps():
    """Kills: a scale that is not divided out, a kernel that runs in a skipped step."""

    def run(fused):
        torch.manual_seed(2)
        p = nn.Parameter(torch.randn(64, 64))
        opt = shardopt.AdamW([p], lr=1e-2, fused=fused, nonfinite="skip")
        for step in range(4):
            p.grad = torch.randn(64, 64) * 1024
            if step == 1:
                p.grad[0, 0] = torch.inf
            opt.grad_scale, opt.found_inf = torch.tensor(1024.0), torch.tensor(float(step == 2))
            opt.step()
        assert opt.skipped_steps == 2 and opt.state[p]["step"] == 2
        return {"p": p.detach(), **opt.state[p]}

    assert differences(run(False), run(True)) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_long_rows(dtype):
    """Kills: the noise of a row's first columns, whose last bits decide what is added, for those beyond 65,536; blocks
    of several tiles at a time that get each other's numbers."""

    def run(fused):
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(2, (1 << 16) + 1300).to(dtype))
        opt = shardopt.AdamW([p], lr=1e-2, rounding="stochastic", state="int8", fused=fused)
        for i in range(2):
            p.grad = (torch.randn(p.shape) * torch.logspace(-3, 3, p.shape[1]) * (i + 1)).to(dtype)
            opt.step()
        return {"p": p.detach(), **opt.state[p]}

    assert differences(run(False), run(True)) == []


def test_threads_do_not_change_a_bit():
    """Kills: a step count advanced while another thread reads it, a tile stepped twice or never."""

    def run(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        params = [nn.Parameter(torch.randn(shape)) for shape in ((300, 1000), (7,), (70, 130), (0, 64), (40000,))]
        opt = shardopt.AdamW(params, lr=1e-2, fused=True)
        for _ in range(3):
            for p in params:
                p.grad = torch.randn(p.shape)
            opt.step()
        return {f"{i} {n}": t for i, p in enumerate(params) for n, t in {"p": p.detach(), **opt.state[p]}.items()}

    before = torch.get_num_threads()
    try:
        assert differences(run(1), run(2)) == []
    finally:
        torch.set_num_threads(before)


class Own(addons.RMSClip):
    """A user's add-on under a known class's name."""


class Halved(rules.Lion):
    """A user's rule: another update under a known class's name."""

    def update(self, p, g, s, h):
        u, step = yield from super().update(p, g * 0.5, s, h)
        return u, step


@pytest.mark.parametrize(
    "recipe, why",
    [
        (Recipe(Halved()), "rule lion has no native twin"),
        (Recipe(rules.Lion(), "int8(block=8192)"), "more than 4096"),
        (Recipe(rules.AdamW(), addons=[Own()]), "add-on rms_clip has no native twin"),
        (Recipe(rules.Adafactor(), addons=[Own()]), "add-on rms_clip has no native twin"),
    ],
)
def test_what_has_no_twin_says_so_and_runs_the_reference(recipe, why):
    """Kills: a twin found by isinstance, a refusal that has changed something already."""
    params = [nn.Parameter(torch.ones(64, 128)) for _ in range(2)]
    for p in params:
        p.grad = torch.ones(64, 128)
    with pytest.raises(ValueError, match=why):
        shardopt.ShardedOptimizer(params, recipe, fused=True).step()
    assert all(bool((p == 1).all()) for p in params)
    free = shardopt.ShardedOptimizer(params, recipe)
    free.step()
    assert free.native.stepped == 0 and why in free.explain() and free.state[params[0]]["step"] == 1


def test_keys_hold_structure_and_no_numbers():
    """Two rates, one kernel; another structure, another kernel. Kills: a number in the key, a switch left out."""

    def cpp(rule, *more):
        recipe = Recipe(rule, "int8", *more)
        return key_at(recipe, (64, 128), torch.float32, torch.float32).cpp

    assert cpp(rules.AdamW(lr=1.0, eps=1e-3)) == cpp(rules.AdamW(lr=0.1, betas=(0.5, 0.9)))
    variants = [
        cpp(rule)
        for rule in (
            rules.AdamW(), rules.AdamW(nesterov=True), rules.AdamW(atan2=True), rules.AdamW(bias_correction=False),
            rules.AdamW(betas=(0.0, 0.9)), rules.Lion(), rules.SGD(), rules.SGD(momentum=0.9), rules.RMSprop(),
            rules.SGD(momentum=0.9, nesterov=True), rules.RMSprop(centered=True), rules.RMSprop(momentum=0.5),
        )
    ]  # fmt: skip
    variants += [cpp(rules.AdamW(), [addons.WeightDecay()]), cpp(rules.AdamW(), [addons.CautiousDecay()])]
    assert len(set(variants)) == len(variants)
    with pytest.raises(NoTwin):
        key_of(Recipe(rules.SGD()), (), torch.float64, torch.float64)
