"""The short way of a repeated step is taken, and is left at once when anything but gradients and numbers changes."""

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.testing._internal.two_tensor import TwoTensor

import shardopt
from tests.threaded import run_threaded

pytestmark = pytest.mark.usefixtures("walking")
SHAPES = ((64, 64), (7, 15), (40,))


def pair(fused_state="int8", **options):
    """The same parameters under kernels and under the reference."""
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        made.append(shardopt.AdamW(params, lr=1e-2, state=fused_state, fused=fused, **options))
    return made


def step(opt, seed):
    torch.manual_seed(seed)
    for group in opt.param_groups:
        for p in group["params"]:
            p.grad = torch.randn(p.shape)
    opt.step()


def equal(a, b):
    for (_, _, p), (_, _, q) in zip(a.parameters(), b.parameters()):
        assert torch.equal(p, q) and a.state[p].keys() == b.state[q].keys()
        assert all(torch.equal(x, y) for x, y in zip(a.state[p].values(), b.state[q].values()))


def test_repeated_steps_take_it_and_follow_the_schedule(taken):
    """Kills: a rate or a step count that stays what it was when the call was made; a fast path that never runs."""
    a, b = pair()
    for opt in (a, b):
        for seed in range(6):
            opt.param_groups[0]["lr"] = 1e-2 / (seed + 1)
            step(opt, seed)
    assert taken == [True] * 5 and a.calls == b.calls == 6
    equal(a, b)


def another_gradient(opt):
    opt.param_groups[0]["params"][0].grad = None


def strided(opt):
    p = opt.param_groups[0]["params"][0]
    p.grad = torch.randn(64, 64).t()


def halved(opt):
    p = opt.param_groups[0]["params"][0]
    p.grad_dtype = None  # any
    p.grad = p.grad.bfloat16()


def moved(opt):
    p = opt.param_groups[0]["params"][1]
    p.data = p.data.clone()


def replaced_part(opt):
    state = opt.state[opt.param_groups[0]["params"][0]]
    state["exp_avg.sqrt8"] = state["exp_avg.sqrt8"].clone()


def moved_state(opt):
    for part in opt.state[opt.param_groups[0]["params"][1]].values():
        part.data = part.data.clone()


def under_way(opt):
    p = opt.param_groups[0]["params"][0]
    p.grad = AsyncCollectiveTensor(p.grad)


def another_class(opt):
    class Named(torch.Tensor):
        """With a memory of its own."""

    p = opt.param_groups[0]["params"][0]
    p.grad = p.grad.as_subclass(Named)


def exchanged_inside(opt):
    old = opt.param_groups[0]["params"][1]
    torch.utils.swap_tensors(old, nn.Parameter(old.detach() + 1))
    old.grad = torch.ones_like(old)


def moved_last_part(opt):
    part = list(opt.state[opt.param_groups[0]["params"][1]].values())[-1]
    torch.utils.swap_tensors(part, part.clone())


def moved_middle_part(opt):
    part = opt.state[opt.param_groups[0]["params"][0]]["exp_avg.sqrt8"]
    part.data = part.data.clone()


def another_part(opt):
    opt.state[opt.param_groups[0]["params"][1]]["of somebody else"] = torch.zeros(3)


def fewer_parameters(opt):
    del opt.param_groups[0]["params"][2]


def reordered(opt):
    opt.param_groups[0]["params"] = opt.param_groups[0]["params"][::-1]


def rescaled(opt):
    opt.grad_scale = torch.tensor(2.0)


def skipping(opt):
    opt.nonfinite = "zero"


def upwards(opt):
    opt.param_groups[0]["maximize"] = True


def another_parameter(opt):
    torch.manual_seed(9)
    q = nn.Parameter(torch.randn(8, 8))
    q.grad = torch.ones(8, 8)
    opt.add_param_group({"params": [q], "lr": 0.3})


def exchanged(opt):
    old = opt.param_groups[0]["params"][2]
    new = nn.Parameter(old.detach() + 1)
    new.grad = torch.ones_like(new)
    opt.param_groups[0]["params"][2] = new


CHANGES = (
    another_gradient, strided, halved, under_way, another_class, moved, exchanged_inside, replaced_part, moved_state,
    moved_last_part, moved_middle_part, another_part, rescaled, skipping, upwards, another_parameter, fewer_parameters,
    reordered, exchanged,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_left_when_something_else_changes(taken, change):
    """Kills: each of the comparisons; without it a stale address is written, or the wrong maths done."""
    results = pair()
    for opt in results:
        step(opt, 0)
        step(opt, 1)
        torch.manual_seed(2)
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape)
        change(opt)
        opt.step()
        opt.grad_scale = None
        step(opt, 3)
    assert taken[:2] == [True, False] or change in (rescaled, another_class)  # which may be taken
    equal(*results)


def test_left_when_somebody_else_has_a_gradient(taken):
    """Kills: a parameter that is no longer frozen, and not stepped."""
    results = pair()
    for opt in results:
        for seed in range(4):
            torch.manual_seed(seed)
            for i, p in enumerate(opt.param_groups[0]["params"]):
                p.grad = torch.randn(p.shape) if i != 1 or seed == 2 else None
            opt.step()
    assert taken == [True, False, False]
    equal(*results)


@pytest.mark.parametrize("wrapped", ["parameter", "gradient"])
def test_what_wraps_other_tensors_has_no_kernel(wrapped):
    """It has no memory of its own. Kills: an address that is null."""
    found = []
    for fused in (None, False):
        p, g = torch.arange(12.0).view(3, 4), torch.ones(3, 4)
        p = nn.Parameter(TwoTensor(p, p.clone()) if wrapped == "parameter" else p)
        opt = shardopt.SGD([p], fused=fused)
        p.grad = TwoTensor(g, g.clone()) if wrapped == "gradient" else g
        opt.step()
        found.append(p.detach().a if wrapped == "parameter" else p.detach())
    assert torch.equal(*found) and found[0][0, 1] < 1


def test_left_where_a_step_is_refused(taken):
    """Kills: a gradient that is read beyond its end."""
    opt = pair()[0]
    step(opt, 0)
    step(opt, 1)
    p = opt.param_groups[0]["params"][2]
    p.grad.data = p.grad[:20].clone()
    with pytest.raises(ValueError, match="has shape"):
        opt.step()
    assert taken == [True, False]


def swapped(p):
    p._local_tensor = p._local_tensor.clone()


def local_data(p):
    p._local_tensor.data = p._local_tensor.clone()


@pytest.mark.parametrize("change", [swapped, local_data], ids=lambda f: f.__name__)
def test_dtensors(taken, change):
    """Gradients of an equal spec, as autograd makes them anew, are of the same kind, others are not. Kills: specs
    compared by identity or not at all, a local tensor taken for where it was."""

    def body(_):
        mesh = init_device_mesh("cpu", (1,))

        def drawn(seed, placement):
            local = torch.randn(64, 64, generator=torch.Generator().manual_seed(seed))
            return distribute_tensor(local, mesh, [placement])

        found = []
        for fused in (True, False):
            p = nn.Parameter(drawn(9, Shard(0)))
            opt = shardopt.AdamW([p], fused=fused)
            for seed in range(4):
                if seed == 2:
                    change(p)
                p.grad = drawn(seed, Shard(0))
                opt.step()
            p.grad = drawn(4, Shard(1))
            with pytest.raises(ValueError, match="placements"):
                opt.step()
            found.append([p._local_tensor, *(x._local_tensor for x in opt.state[p].values() if x.ndim)])
        return found

    kernels, reference = run_threaded(1, body)[0]
    assert taken == [True, False, True, False]
    assert all(torch.equal(x, y) for x, y in zip(kernels, reference, strict=True))
