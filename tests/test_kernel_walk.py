"""The native look at a repeated step: that it is what looks, what it notices of DTensors, and that it keeps nothing."""

import gc
import sys

import pytest
import torch
from torch import nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

import shardopt
from shardopt.kernels import native_walk
from shardopt.kernels.native_walk import NativeWalk, NoWalk
from tests.threaded import run_threaded

SHAPES = ((8, 4), (5,), (1, 1), (0, 3))


def gradients(params, mesh=None):
    for p in params:
        g = torch.ones(p.shape)
        p.grad = g if mesh is None else distribute_tensor(g, mesh, [Shard(0)])


def stepped(mesh=None, frozen=True):
    """An optimizer that has repeated a step, with fresh gradients."""
    params = [torch.ones(shape) for shape in SHAPES]
    params = [nn.Parameter(p if mesh is None else distribute_tensor(p, mesh, [Shard(0)])) for p in params]
    opt = shardopt.AdamW(params, lr=1e-2)
    for _ in range(2):
        gradients(params[frozen:], mesh)
        opt.step()
    gradients(params[frozen:], mesh)
    return opt, params, opt.native.replay.walk


def looked(opt, walk):
    return walk.run(opt.param_groups, opt.state)


def on_a_mesh(test):
    """Run in a world of one rank."""
    run_threaded(1, lambda _: test(init_device_mesh("cpu", (1,))))


def local_of(tensor):
    return getattr(tensor, "_local_tensor", tensor)


@pytest.mark.parametrize("meshed", [False, True])
def test_it_finds_the_gradients(meshed):
    """Kills: a walk that is never native; an address of the wrapper; an empty tensor's null taken for a wrapper's."""

    def test(mesh):
        opt, params, walk = stepped(mesh if meshed else None)
        assert type(walk) is NativeWalk
        found = looked(opt, walk)
        assert found.tolist() == [local_of(p.grad).data_ptr() for p in params[1:]] and found[-1] == 0

    on_a_mesh(test)


def empty_dict(opt, params, walk):
    opt.state[params[-1]].clear()


def other_dict(opt, params, walk):
    opt.state[params[1]] = {name: part.clone() for name, part in opt.state[params[1]].items()}


def no_state(opt, params, walk):
    dict.pop(opt.state, params[-1])


def thawed(opt, params, walk):
    params[0].grad = distribute_tensor(torch.ones(8, 4), params[0].device_mesh, [Shard(0)])


def under_way(opt, params, walk):
    g = params[1].grad
    g._local_tensor = AsyncCollectiveTensor(g._local_tensor)


def local_dtype(opt, params, walk):
    params[1].grad._local_tensor = params[1].grad._local_tensor.bfloat16()


def local_size(opt, params, walk):
    params[1].grad._local_tensor = params[1].grad._local_tensor[:2].clone()


def local_stride(opt, params, walk):
    params[1].grad._local_tensor = torch.ones(5, 2)[:, 0]


def local_sparse(opt, params, walk):
    params[1].grad._local_tensor = torch.ones(5).to_sparse()


def local_opaque(opt, params, walk):
    params[1].grad._local_tensor = torch.ones(5).to_mkldnn()


def local_none(opt, params, walk):
    params[1].grad._local_tensor = None


def local_gone(opt, params, walk):
    del params[1].grad._local_tensor


def spec_gone(opt, params, walk):
    del params[1].grad._spec


def local_freed(opt, params, walk):
    params[1].grad._local_tensor.untyped_storage().resize_(0)


def parameter_freed(opt, params, walk):
    params[1]._local_tensor.untyped_storage().resize_(0)


def parameter_swapped(opt, params, walk):
    local = params[1]._local_tensor
    torch.utils.swap_tensors(local, local.clone())


def other_local(opt, params, walk):
    params[1]._local_tensor = params[1]._local_tensor.clone()


def other_placements(opt, params, walk):
    g = params[1].grad
    params[1].grad = DTensor.from_local(g._local_tensor, g.device_mesh)  # replicated


def other_part(opt, params, walk):
    part = opt.state[params[1]]["exp_avg"]
    part._local_tensor = part._local_tensor.clone()


def part_freed(opt, params, walk):
    opt.state[params[1]]["exp_avg"]._local_tensor.untyped_storage().resize_(0)


def part_moved(opt, params, walk):
    local = opt.state[params[1]]["exp_avg"]._local_tensor
    local.data = local.clone()


def unlike(opt, params, walk):
    class Unlike:
        def __eq__(self, other):
            raise RuntimeError("cannot say")

    params[1].grad._spec = Unlike()


CHANGES = (
    empty_dict, other_dict, no_state, thawed, under_way, local_dtype, local_size, local_stride, local_sparse,
    local_opaque, local_none, local_gone, spec_gone, local_freed, parameter_freed, parameter_swapped, other_local,
    other_placements, other_part, part_freed, part_moved, unlike,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_what_it_notices_of_dtensors(change, capfd):
    """As the walk in Python does. Kills: each of the native comparisons; an error of torch's that is asked for."""

    def test(mesh):
        opt, params, walk = stepped(mesh)
        assert looked(opt, walk) is not None
        change(opt, params, walk)
        assert looked(opt, walk) is None and super(NativeWalk, walk).run(opt.param_groups, opt.state) is None

    on_a_mesh(test)
    assert "Exception" not in capfd.readouterr().err


def test_an_equal_spec_is_the_same():
    """As autograd makes it anew. Kills: specs by identity alone; a spec that dies while it is compared."""

    class Equal:
        def __init__(self, gradient):
            self.gradient = gradient

        def __eq__(self, other):
            self.gradient._spec = other
            gc.collect()
            return True

    def test(mesh):
        opt, params, walk = stepped(mesh)
        params[1].grad._spec = Equal(params[1].grad)
        assert looked(opt, walk) is not None and type(params[1].grad._spec) is not Equal

    on_a_mesh(test)


def test_an_interrupt_goes_through():
    """Kills: an exception that is swallowed or left for whoever comes next."""

    class Impatient:
        def __eq__(self, other):
            raise KeyboardInterrupt

    def test(mesh):
        opt, params, walk = stepped(mesh)
        params[1].grad._spec = Impatient()
        with pytest.raises(KeyboardInterrupt):
            looked(opt, walk)

    on_a_mesh(test)


def counted(opt, params, walk):
    """Reference counts of all that a walk touches."""
    grads = [p.grad for p in params]
    touched = [*params, *grads, *map(local_of, grads), *map(local_of, params), *walk.parts, *walk.held, *walk.specs]
    touched += [*walk.states, opt.state, opt.param_groups[0]["params"], DTensor, torch.Tensor, nn.Parameter]
    touched += [g._spec for g in grads if hasattr(g, "_spec")]
    return [sys.getrefcount(x) for x in [*touched, native_walk.GRAD] if x is not None]


@pytest.mark.parametrize("change", [None, *CHANGES], ids=lambda f: getattr(f, "__name__", "unchanged"))
def test_it_keeps_nothing(change):
    """Kills: a reference that is not given back, or given back twice."""

    def test(mesh):
        for meshed in (mesh, None) if change is None else (mesh,):
            opt, params, walk = stepped(meshed)
            if change is not None:
                change(opt, params, walk)
            looked(opt, walk)
            for _ in range(3):  # another thread may meanwhile take or give back what all share, such as the word "grad"
                before = counted(opt, params, walk)
                for _ in range(100):
                    looked(opt, walk)
                after = counted(opt, params, walk)
                if after == before:
                    break
            assert after == before

    on_a_mesh(test)


def test_gradients_may_come_and_go():
    """Kills: a remembered place that is read after its tensor died."""

    def test(mesh):
        opt, params, walk = stepped(mesh)
        for i in range(50):
            opt.zero_grad()
            held = [torch.ones(5 + i) for _ in range(i)]
            gradients(params[1:], mesh)
            assert looked(opt, walk).tolist() == [local_of(p.grad).data_ptr() for p in params[1:]] and len(held) == i

    on_a_mesh(test)


@pytest.mark.parametrize("where", ["functions", "library", "slots"])
def test_elsewhere_python_walks(where, monkeypatch, taken):
    """Kills: a step that fails, or is looked up anew, where the native walk cannot be had."""

    def refuse(*_):
        raise NoWalk("not here")

    monkeypatch.setattr(native_walk, where, refuse)

    def test(mesh):
        opt, _, walk = stepped(mesh)
        assert type(walk) is not NativeWalk
        opt.step()

    on_a_mesh(test)
    assert taken == [True] * 2


def test_unlike_layouts_are_refused():
    """Kills: a word that is guessed where several or none hold what is looked for."""
    with pytest.raises(NoWalk):
        native_walk.only(native_walk.places([[7, 1, 1], [7, 2, 2]], [1, 2]))
    with pytest.raises(NoWalk):
        native_walk.only(native_walk.places([[7, 1], [7, 2]], [1, 3]))
    assert native_walk.only(native_walk.places([[7, 1], [7, 2]], [1, 2])) == 1
