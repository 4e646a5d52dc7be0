"""Kernels in passes: what asks, and what steps from stored values, computes what the reference computes."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt.asks import Total
from shardopt.codecs.geometry import Geometry
from shardopt.dtensor.answer import local_value
from shardopt.dtensor.messages import dims_over
from shardopt.kernels import cpu, cuda, key_at
from shardopt.kernels.cache import NoCompiler
from shardopt.kernels.rounds import size_of
from shardopt.kernels.spans import shape_of
from shardopt.recipe import Recipe
from tests.fake_gpu import emulated
from tests.kernel_kit import asking_cases, differences, stepped
from tests.table import ADDONS, FLIPS, RULES, UNSHARDED, recipe
from tests.virtual import bits

CASES = asking_cases()
SHAPES = ((1100, 1300), (70, 130), (4, 32, 48), (66, 9, 3, 3), (7, 15), (40,), (), (0, 64), (5, 17000))
SIGNED = {"signed": "int8", "non_negative": "factored"}
EVERY = ("clip_by_global_norm", "gradient_centralization", "orthograd", "rms_clip", "cautious", "decay")


def check(reference, kernel):
    """The bounds of contracts.md section 7 where sums are asked, over all tensors of one parameter."""
    assert reference.keys() == kernel.keys()
    for name, x in reference.items():
        y = kernel[name]
        assert (x.dtype, x.shape) == (y.dtype, y.shape) and torch.equal(x.isnan(), y.isnan()), name
        if x.dtype == torch.float32:
            x, y = x.nan_to_num(), y.nan_to_num()
            assert (x - y).double().norm() <= UNSHARDED * x.double().norm(), name
        else:
            apart = (bits(x).int() - bits(y).int()).abs()
            assert apart.numel() == 0 or apart.max() <= 1, name
            assert (apart > 0).sum() <= max(1, FLIPS * x.numel()), name


@pytest.mark.shipped
@pytest.mark.parametrize("case, gradient", CASES, ids=[f"{c.name()}-{str(g)[6:]}" for c, g in CASES])
def test_equals_the_reference(case, gradient):
    """Kills: a sum over the wrong elements, a mean over the wrong count, an answer of another ask or another round, an
    order of add-ons, a row's number taken for its neighbour's, a value used fresh where it is stored."""
    check(stepped(case, gradient, fused=False), stepped(case, gradient, fused=True))


def parameters(dtype=torch.float32, shapes=SHAPES):
    torch.manual_seed(5)
    return [nn.Parameter((torch.randn(shape) * 0.3).to(dtype)) for shape in shapes]


def several(fused, rule, state, addons, steps=3, spoil=None, dtype=torch.float32, shapes=SHAPES, **options):
    """Parameters of many shapes in two groups with other numbers; what is left of them after some steps."""
    ps = parameters(dtype, shapes)
    groups = [{"params": ps[::2], "lr": 1e-2}, {"params": ps[1::2], "lr": 3e-3}]
    opt = shardopt.ShardedOptimizer(
        groups, Recipe(rule, state, addons, **options.pop("recipe", {})), fused=fused, **options
    )
    torch.manual_seed(6)
    for step in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape).to(dtype)
        if spoil is not None:
            spoil(opt, ps, step)
        opt.step()
    if fused:
        assert (opt.native.stepped, opt.native.left) == (len(ps), 0)
    return [{"p": p.detach(), **opt.state[p]} for p in ps], opt


def compare(*given, **options):
    reference, kernel = several(False, *given, **options)[0], several(True, *given, **options)[0]
    for one, other in zip(reference, kernel):
        check(one, other)
    return kernel


RECIPES = {
    "adamw": (RULES["adamw.nesterov"], SIGNED, EVERY),
    "adafactor": (RULES["adafactor.update"], SIGNED, ("orthograd", "cautious", "cautious_decay")),
    "adafactor hf": (RULES["adafactor.hf"], "factored", ("gradient_centralization", "l2")),
    "rmsprop": (RULES["rmsprop.centered"], SIGNED, ("mars", "rms_clip")),
}


@pytest.mark.shipped
@pytest.mark.parametrize("name", RECIPES)
def test_many_shapes_in_one_call(name, monkeypatch):
    """One native call a pass for all parameters of a key. Kills: a call a parameter, places, sums or answers of another
    parameter, group or matrix of a stack, pieces of one span counted in the next."""
    calls = []
    sums = cpu.Stepper.sums
    monkeypatch.setattr(cpu.Stepper, "sums", lambda self, *given: (calls.append(given[0]), sums(self, *given))[1])
    rule, state, addons = RECIPES[name]
    compare(rule(), state, addons)
    opt = several(True, rule(), state, addons, 1)[1]
    assert len(opt.native.calls) <= 3  # vectors, matrices too small for int8, matrices
    assert len(calls) == 4 * sum(len(call.rounds) for call in opt.native.calls)


@pytest.mark.shipped
@pytest.mark.parametrize("name", ["adamw", "adafactor"])
def test_threads_do_not_change_a_bit(name):
    """Kills: sums by thread, pieces by the number of threads, rows and columns written before all have read them."""
    rule, state, addons = RECIPES[name]
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(several(True, rule(), state, addons)[0])
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert [differences(a, b) for a, b in zip(found[0], other)] == [[]] * len(SHAPES)


@pytest.mark.shipped
@pytest.mark.parametrize("kind", ["nan", "inf", "zero", "parallel"])
@pytest.mark.parametrize("nonfinite", ["propagate", "zero", "skip"])
def test_gradients_that_spoil(kind, nonfinite):
    """Kills: a clamp or a maximum that drops NaN, 0 / 0 where nothing moves, noise made a full step where the gradient
    is along the parameter, a small remainder that is not noise made none; a step half taken."""

    def spoil(opt, ps, step):
        if kind == "zero":
            ps[step].grad.zero_()
        elif kind == "parallel":
            ps[step].grad = 2 * ps[step].detach() + 1e-3 * (step > 0) * ps[step].grad
        elif step == 1:
            ps[0].grad[1000, 1200] = float(kind)
            ps[3].grad[3, 2, 1, 1] = -float(kind)

    for name in ("adamw", "adafactor"):
        rule, state, addons = RECIPES[name]
        addons = [a for a in addons if a != "clip_by_global_norm"]  # it would spoil every parameter alike
        compare(rule(), state, addons, spoil=spoil, nonfinite=nonfinite)


def test_parameters_that_are_zero():
    """Kills: a smallest RMS(p) left out, a division by ||p||^2."""

    def spoil(opt, ps, step):
        if step == 0:
            for p in ps[:4]:
                p.data.zero_()

    for addons in ((), ("orthograd", "cautious")):
        compare(RULES["adafactor.hf"](), "factored", addons, spoil=spoil)


STORED = ("adafactor.fixed", "rmsprop.centered", "adamw.nesterov")


@pytest.mark.parametrize("on", ["cpu", "lanes"])
@pytest.mark.parametrize("rule", STORED)
def test_steps_from_what_is_stored(rule, on, monkeypatch):
    """Blocks of several chunks, rows that end inside one, a momentum of what is stored itself. Kills: extremes of the
    preview before left where no element is, one preview where two are needed, codes read back as another type."""
    if on == "lanes":
        monkeypatch.setattr(cpu, "load", emulated)
    states = (
        {"signed": "int8", "non_negative": "root4(block=64)"},
        {"signed": "dyn4(block=32)", "non_negative": "log8"},
    )
    for state, dtype in zip(states, (torch.float32, torch.bfloat16)):
        chosen = {"update_from": "stored", "rounding": "stochastic"}
        shapes = ((70, 130), (4, 32, 48), (40,))
        compare(RULES[rule](), state, ("decay",), dtype=dtype, recipe=chosen, shapes=shapes)


@pytest.mark.parametrize("rule, arch", list(zip(STORED, ("sm_80", "sm_90", "sm_100"))))
def test_previews_compile_without_spills(rule, arch):
    """Kills: registers indexed by the number of the preview."""
    try:
        cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))
    chosen = Recipe(RULES[rule](), {"signed": "int8", "non_negative": "root4"}, update_from="stored")
    key = key_at(chosen, (4096, 4096), torch.bfloat16, torch.bfloat16)
    cuda.compiled(key, arch)
    report = cuda.entry_of(key, arch).facts()["report"]
    assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), report


def test_options_of_the_step():
    """maximize, GradScaler, a skipped step, strided gradients, bf16. Kills: a scale or sign that a pass does not see, a
    pass that writes."""

    def spoil(opt, ps, step):
        opt.param_groups[1]["maximize"] = True
        opt.grad_scale, opt.found_inf = torch.tensor(64.0), torch.tensor(float(step == 1))
        ps[0].grad = ps[0].grad.t().contiguous().t()

    for recipe_ in ({"rounding": "stochastic"}, {"rounding": "kahan", "update_from": "stored"}):
        rule, state, addons = RECIPES["adafactor"]
        compare(rule(), state, addons, spoil=spoil, dtype=torch.bfloat16, recipe=recipe_)


def recorded(opt):
    """Every round of an optimizer's asks: kind, dims reduced over, shape and dtype on the wire, and the values."""
    rounds, values, start, standing = [], [], opt.answers.start, opt.answers.standing

    def record(asked):
        known = [(l, a) for l, a in asked if not isinstance(a, Total)]
        found = [local_value(l, a).clone() for l, a in known]
        rounds.append([(type(a), dims_over(l, a), x.shape, x.dtype) for (l, a), x in zip(known, found)])
        values.append(found)

    def kept(asked, flats):
        made = standing(asked, flats)
        begin = made.start
        made.start = lambda: (record(asked), begin())
        return made

    opt.answers.start = lambda asked: (record(asked), start(asked))[1]
    opt.answers.standing = kept
    return rounds, values


ASKING = [("adafactor.raw", addons) for addons in ADDONS if addons != "clip"]
ASKING += [(rule, "all") for rule in ("adamw", "rmsprop.centered", "adafactor.update", "adafactor.hf")]


@pytest.mark.parametrize("rule, addons", ASKING)
def test_asks_what_the_reference_asks(rule, addons):
    """Another rank may run the reference. Kills: a round too many, an order, a shape, a dtype, another reduction."""
    found = []
    for fused in (False, True):
        ps = parameters(shapes=[shape for shape in SHAPES[1:] if shape != (7, 15)])  # two formats of state
        opt = shardopt.ShardedOptimizer(ps, recipe(rule, "sqrt8+factored", addons), fused=fused)
        rounds, values = recorded(opt)
        for seed in range(2):
            torch.manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape)
            opt.step()
        found.append((rounds, values))
    assert found[0][0] == found[1][0]
    for mine, others in zip(found[0][1], found[1][1]):
        for x, y in zip(mine, others):
            assert torch.allclose(x, y, rtol=1e-6, atol=1e-12)


def test_nothing_but_gradients_may_stay_where_it_was():
    """Calls are kept between steps. Kills: a stale address of a parameter, a part or a step count, numbers of the last
    step, a repeated step that plays asking kernels without their answers."""

    def spoil(opt, ps, step):
        opt.param_groups[0]["lr"] = 1e-2 / (step + 1)
        if step == 2:
            ps[1].data = ps[1].data.clone()
        if step == 3:
            opt.load_state_dict(opt.state_dict())
        if step == 4:
            state = opt.state[ps[0]]
            state.update({name: part.clone() for name, part in state.items()})
        if step == 5:
            ps[2].grad = None

    for name in ("adafactor", "rmsprop"):
        rule, state, addons = RECIPES[name]
        reference, kernel = (several(fused, rule(), state, addons, 5, spoil)[0] for fused in (False, True))
        for one, other in zip(reference, kernel):
            check(one, other)


def test_some_ask_and_some_do_not():
    """Kills: a short way that forgets what asks or another gradient, counters of one kind for the other's."""

    def run(fused):
        ps = parameters(shapes=SHAPES[:3])
        groups = [{"params": [p], "addons": [] if p is ps[1] else ["cautious"]} for p in ps]
        opt = shardopt.AdamW(groups, lr=1e-2, fused=fused)
        for seed in range(4):
            torch.manual_seed(seed)
            for p in ps:
                p.grad = torch.randn(p.shape)
            opt.step()
        assert not fused or (opt.native.stepped, opt.native.left, opt.native.asked) == (3, 0, 2)
        return [{"p": p.detach(), **opt.state[p]} for p in ps]

    for one, other in zip(run(False), run(True)):
        check(one, other)


@pytest.mark.parametrize("shape", [(4096, 4096), (4096, 11008), (32000, 4096)])
def test_sums_are_small_beside_the_parameters(shape):
    """Sums of pieces, what is asked and what is answered, against a matrix's bytes. Kills: a column of sums a row."""
    for addons, dtype in (("none", torch.bfloat16), ("all", torch.float32)):
        key = key_at(recipe("adafactor.update", "sqrt8+factored", addons), shape, dtype, dtype)
        places = shape_of(Geometry.whole(shape), key, [], 4, 4).places
        sums = max(one.sums for one in places.values())
        asked = sum(size_of(word, shape) for asked in key.rounds for word in asked)
        assert 8 * sums + (8 + 4) * asked < 0.01 * dtype.itemsize * shape[0] * shape[1]
