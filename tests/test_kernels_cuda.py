"""The GPU's kernels without a GPU: NVRTC's report, a team of 32 emulated lanes, and what a launch is given."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import shardopt
from shardopt import Recipe
from shardopt.kernels import NoTwin, cuda, key_at, launcher
from shardopt.kernels.cache import CSRC, NoCompiler
from shardopt.kernels.spans import GROUP, KEY, PARTS, ROWS, STEP, TILE0, G, P
from shardopt.rules import AdamW
from tests.fake_gpu import PROCESSORS, FakeDriver, emulated, gpu  # noqa: F401
from tests.kernel_kit import differences, native_cases, optimizer_of, stepped
from tests.table import DTYPES, Case

CASES = list(native_cases())
ARCHS = ("sm_80", "sm_90", "sm_100")
BUDGET = Recipe(AdamW(), {"signed": "sqrt8", "non_negative": "root4"}, ("cautious_decay",), "stochastic")
KEY_OF_BUDGET = key_at(BUDGET, (4096, 4096), torch.bfloat16, torch.bfloat16)


def key_of_case(case, gradient, shape=(4096, 4096)):
    """The key of a case's recipe for a large matrix; None where it has no twin."""
    dtype = DTYPES[case.dtype]
    try:
        return key_at(case.recipe(), shape, dtype, gradient)
    except NoTwin:
        return None


def covering():
    """So few keys that every struct of the cover is compiled with all its switches."""
    texts = {}
    for case in CASES:
        if key := key_of_case(*case):
            structs = re.findall(r"\b[A-Z]\w*(?:<[\w, ]*>)?", key.cpp)
            texts[key] = {re.sub(r"\b\d+u?\b", "", struct) for struct in structs}
    wanted = set().union(*texts.values())
    while wanted:
        best = max(texts, key=lambda key: len(texts[key] & wanted))
        wanted -= texts[best]
        yield best


@pytest.fixture
def nvrtc():
    try:
        return cuda.bindings()
    except NoCompiler as why:
        pytest.skip(str(why))


@pytest.mark.parametrize("arch", ARCHS)
def test_compiles_without_spills(nvrtc, arch):
    """Each key for one of the architectures, between which no source differs. Kills: a header of the host, an index of
    a register array that is not constant, a table on the stack."""
    for key in list(covering())[ARCHS.index(arch) :: len(ARCHS)]:
        cuda.compiled(key, arch)
        report = cuda.entry_of(key, arch).facts()["report"]
        assert (report["stack"], report["spill_stores"], report["spill_loads"]) == (0, 0, 0), (key.cpp, report)
        assert 16 < report["registers"] <= 168, (key.cpp, report)


def test_budget_of_registers(nvrtc):
    """Kills: a second body for tails (109 registers), unpacked windows. AdamW int8 with bf16: four CTAs a processor."""
    cuda.compiled(KEY_OF_BUDGET, "sm_90", fast=True)
    note = cuda.entry_of(KEY_OF_BUDGET, "sm_90", fast=True).facts()
    assert note["report"]["registers"] <= 64 and note["report"]["stack"] == 0, note["report"]


def test_no_loop_is_lost():
    """NVRTC 13 drops a loop with a pragma that follows a discarded one whose body has braces: `if constexpr (false)
    #pragma for {} #pragma for`. Kills: such a pair anywhere, on which no emulated GPU can tell."""
    pragma, found = r"(?:UNROLL|ELEMENTS|IVDEP|ROLLED)\b", []
    for path in CSRC.glob("*.h"):
        text = re.sub(r"//.*", "", path.read_text())
        for match in re.finditer(rf"(?:if constexpr \(.*\)|else)\s+{pragma}[^{{;]*;[^{{;]*;[^{{;]*\{{", text):
            depth, at = 1, match.end()
            while depth:
                depth, at = depth + (text[at] == "{") - (text[at] == "}"), at + 1
            if re.match(rf"\s*{pragma}", text[at:]):
                found.append((path.name, match.group()))
    assert not found


def test_the_cache_keeps_modes_and_architectures_apart(nvrtc):
    """Kills: options or architecture missing in the name of a cached cubin."""
    key = key_of_case(*CASES[0])
    given = [(key, "sm_80", False), (key, "sm_90", False), (key, "sm_90", True)]
    assert len({cuda.entry_of(*one).path for one in given}) == 3
    assert cuda.arch_of((9, 0)) == "sm_90" and cuda.arch_of((8, 9)) == "sm_89"
    with pytest.raises(NoCompiler, match="compute capability"):
        cuda.arch_of((3, 5))


@pytest.mark.parametrize("case, gradient", CASES[2::5], ids=[c.name() for c, _ in CASES[2::5]])
def test_lanes_equal_the_reference(gpu, case, gradient):  # noqa: F811
    """Kills: a shuffle that reaches too few lanes or beyond a block, a tail that is stored or counted, a chunk left
    out, an alignment taken for granted, a step counter advanced before all have read it."""
    found = differences(stepped(case, gradient, False, 3), stepped(case, gradient, True, 3))
    assert gpu and all(one.driver.launches for one in gpu.values())
    if not ("log" in case.state or "atan2" in case.rule):
        assert not found
    for difference in found:  # as in test_kernels.py
        assert difference.elements <= 2 or difference.largest < 1e-6, found


@pytest.mark.parametrize("state", ["int4+log4", "dyn4+log16", "sqrt8+root4", "dyn8"])
def test_what_lies_beyond_a_row(gpu, state):  # noqa: F811
    """Kills: elements after the last one counted as their block's largest, a last half byte that is not a zero.

    The gradient turns round, so that every momentum shrinks, while that of an absent element, code 0, would not.
    """
    case = Case("adamw", state, "decay", "nearest", "fp32", "fresh", (60, 81))

    def run(fused):
        opt = optimizer_of(case, torch.float32, torch.float32, fused=fused)
        (p,) = opt.param_groups[0]["params"]
        for sign in (1, -1, -1):
            torch.manual_seed(0)
            p.grad = sign * (1 + torch.rand(case.shape))
            opt.step()
        return {"p": p.detach(), **opt.state[p]}

    found = differences(run(False), run(True))
    assert gpu and all(difference.elements <= 2 for difference in found) and (not found or "log" in state), found


SHAPES = [(64, 256), (130, 70), (33, 512), (7,), (1,), (16, 1000), (65, 129), (300,), (40, 264)]


def several(fused, steps=3):
    """Parameters of many shapes in two groups, so that CTAs hold several spans and spans several CTAs."""
    torch.manual_seed(1)
    ps = [nn.Parameter(torch.randn(shape).bfloat16()) for shape in SHAPES]
    groups = [{"params": ps[:4], "lr": 1e-2}, {"params": ps[4:], "lr": 3e-3, "weight_decay": 0.2}]
    opt = shardopt.ShardedOptimizer(groups, BUDGET, fused=fused)
    for _ in range(steps):
        for p in ps:
            p.grad = torch.randn(p.shape).bfloat16()
        opt.step()
    return [{"p": p.detach(), **opt.state[p]} for p in ps]


def test_spans_share_ctas(gpu):  # noqa: F811
    """Kills: scalars of the span before, a group's numbers taken for another's, tiles of a CTA lost or done twice."""
    for reference, kernel in zip(several(False), several(True)):
        assert differences(reference, kernel) == []
    assert any(ctas > PROCESSORS for one in gpu.values() for _, ctas, _ in one.driver.launches)


# What a launch is given ------------------------------------------------------------------------------------------

WORDS = PARTS + 4


def spans_of(tensors, tiles_each=16, groups=1):
    """Made-up descriptors: every pointer is its own number."""
    spans = np.arange(tensors * WORDS, dtype=np.int64).reshape(tensors, WORDS) + (1 << 40)
    spans[:, GROUP] = np.arange(tensors) * groups // tensors
    spans[:, TILE0] = np.arange(tensors) * tiles_each
    return spans, tensors * tiles_each


@pytest.mark.parametrize("groups", [1, 7, 291])
def test_launches_of_llama_7b(groups):
    """Kills: a launch a tensor, a launch a group, a parameter beyond 32,764 bytes, spans lost between two launches."""
    spans, tiles = spans_of(291, groups=groups)
    numbers = [[float(group), 1.0, 2.0, 3.0, 4.0] for group in range(groups)]
    driver = FakeDriver(processors=132)
    launcher.Launcher(KEY_OF_BUDGET, driver)(spans, tiles, numbers, spans[:, STEP].copy())
    steps = [parameter for kernel, _, parameter in driver.launches if kernel == "shardopt_step"]
    assert len(driver.launches) <= 4 and len(steps) <= 3
    seen, done = 0, 0
    for parameter in steps:
        count, here, per, n, pointers, taken = parameter[:6].tolist()
        rows = parameter[6 + n : 6 + n + count * WORDS].reshape(count, WORDS)
        expected = spans[seen : seen + count]
        for column in (P, G, STEP, KEY, ROWS, *range(PARTS, WORDS)):
            assert (rows[:, column] == expected[:, column]).all()
        assert (rows[:, TILE0] + done == expected[:, TILE0]).all() and (pointers, taken) == (0, 0)
        values = parameter[6 : 6 + n].view(np.float64).reshape(-1, 5)
        assert (values[rows[:, GROUP], 0] == expected[:, GROUP]).all()
        assert per % 8 == 0
        seen, done = seen + count, done + here
    assert (seen, done) == (291, tiles)
    counters = driver.launches[-1]
    assert counters[0] == "shardopt_advance" and counters[2][0] == 291
    assert (counters[2][2 : 2 + 291] == spans[:, STEP]).all()


def test_every_cta_has_tiles():
    """Kills: a grid rounded down, an empty CTA at its end."""
    for tiles in (1, 7, 8, 9, 1000, 10**6, 10**9):
        per = launcher.tiles_of_a_cta(tiles, 132)
        assert per % 8 == 0 and 8 <= per <= 256
        driver = FakeDriver(processors=132)
        spans = np.zeros((1, WORDS), dtype=np.int64)
        launcher.Launcher(KEY_OF_BUDGET, driver)(spans, tiles, [[0.0]], np.zeros(1, dtype=np.int64))
        ctas = driver.launches[0][1]
        assert (ctas - 1) * per < tiles <= ctas * per


def packed_step(lr, taken=None):
    """One step of one matrix, descriptors written by hand; returns p before and after, and the counter."""
    p, g = torch.randn(6, 40).bfloat16(), torch.randn(6, 40).bfloat16()
    step, key = torch.zeros(()), torch.tensor(5)
    parts = [torch.zeros(6, 40, dtype=torch.int8), torch.zeros(6, 1), torch.zeros(6, 40, dtype=torch.uint8)]
    parts.append(torch.zeros(6, 1))
    places = [p.data_ptr(), g.data_ptr(), step.data_ptr(), key.data_ptr(), 0, 6, 40, 0, 0, 40, 40, 0]
    spans = np.array([[*places, *(part.data_ptr() for part in parts)]], dtype=np.int64)
    old = p.clone()
    run = emulated(KEY_OF_BUDGET)
    run(spans, 6, [[lr, 0.9, 0.99, 1e-8, 0.1]], spans[:, STEP].copy(), taken)
    return old, p, float(step)


def test_a_learning_rate_on_the_device():
    """Kills: a pointer that is not followed, a value read when the launch is packed."""
    torch.manual_seed(0)
    plain = packed_step(0.125)
    torch.manual_seed(0)
    tensor = packed_step(torch.tensor(0.125))
    assert torch.equal(plain[1], tensor[1]) and not torch.equal(*plain[:2])


def test_a_step_that_is_not_taken_writes_nothing():
    """Kills: kernels that ignore the flag, counters that advance all the same."""
    old, new, step = packed_step(0.1, taken=torch.tensor(False))
    assert torch.equal(old, new) and step == 0
    old, new, step = packed_step(0.1, taken=torch.tensor(True))
    assert not torch.equal(old, new) and step == 1


def test_what_is_missing_is_named(monkeypatch):
    """Kills: an ImportError for users who have no NVRTC."""
    import builtins

    real = builtins.__import__

    def without(name, *rest):
        if name.startswith("cuda"):
            raise ImportError(f"No module named {name!r}")
        return real(name, *rest)

    monkeypatch.setattr(cuda, "bindings", cuda.bindings.__wrapped__)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(NoCompiler, match=r"pip install .*cuda-bindings"):
        cuda.bindings()
