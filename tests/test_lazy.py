"""State appears complete, at the first look, never on meta; and what makes no sense says so at the first step."""

import itertools

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import _init_optim_state
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

import shardopt
from tests.table import weights
from tests.threaded import run_threaded
from tests.virtual import bits


def linear(device=None, dtype=None):
    return nn.Sequential(nn.Linear(96, 67, device=device, dtype=dtype), nn.Linear(67, 5, device=device, dtype=dtype))


def fill(model):
    """The same weights on every mesh, into the storage that is there."""
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            put(p, weights(tuple(p.shape), p.dtype, seed=i))


def put(p, whole):
    local = p._local_tensor if isinstance(p, DTensor) else p
    local.copy_(mine(whole, p))


def mine(whole, p):
    """This rank's rows of a tensor, for a parameter under FSDP2 or a plain one."""
    if not isinstance(p, DTensor):
        return whole
    rank, size = p.device_mesh.get_local_rank(), p.device_mesh.size()
    rows = -(-whole.shape[0] // size)
    return whole[rank * rows : (rank + 1) * rows]


def give(model, step):
    for i, p in enumerate(model.parameters()):
        g = mine(weights(tuple(p.shape), p.dtype, seed=50 * step + i), p).clone()
        if isinstance(p, DTensor):
            g = DTensor.from_local(g, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())
        p.grad = g


def locals_of(optimizer):
    """Every parameter and every part of the state, local, in order."""
    found = []
    for p in optimizer.param_groups[0]["params"]:
        for x in (p, *optimizer.state[p].values()):
            found.append((x._local_tensor if isinstance(x, DTensor) else x).detach().clone())
    return found


def same(a, b):
    return len(a) == len(b) and all(bits(x).equal(bits(y)) for x, y in zip(a, b))


def trained(sharded, before, look, fused):
    """Model and optimizer made in the given order, and trained for two steps."""
    model = linear("meta")
    if sharded:
        fully_shard(model, mesh=init_device_mesh("cpu", (3,)))
    if before:
        optimizer = shardopt.AdamW(model.parameters(), lr=0.01, fused=fused)
        if look:
            assert all(optimizer.state[p] == {} for p in model.parameters())
            assert optimizer.state_dict()["state"] == {} and len(optimizer.state) == 0, "never on meta"
    model.to_empty(device="cpu")
    fill(model)
    if not before:
        optimizer = shardopt.AdamW(model.parameters(), lr=0.01, fused=fused)
    if look:
        assert len(optimizer.state_dict()["state"]) == 4
        assert all(x.device.type == "cpu" for p in model.parameters() for x in optimizer.state[p].values())
    for step in range(2):
        give(model, step)
        optimizer.step()
    return locals_of(optimizer)


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fsdp"])
def test_every_order_gives_the_same(sharded):
    """P40. fused None, False or True x before or after to_empty x looked at first or stepped first. Kills: state on
    meta, an empty entry of a look on meta that is taken for state."""

    def body(_=0):
        results = [
            trained(sharded, before, look, fused)
            for before, look, fused in itertools.product((False, True), (False, True), (None, False, True))
            if sharded or not before
        ]
        assert all(same(results[0], other) for other in results)

    run_threaded(3, body) if sharded else body()


def test_plain_meta_parameters_are_stale():
    """to_empty replaces them: the optimizer holds what nobody trains. Kills: a step that silently does nothing."""
    model = linear("meta")
    optimizer = shardopt.AdamW(model.parameters())
    model.to_empty(device="cpu")
    fill(model)
    give(model, 0)
    with pytest.raises(ValueError, match=r"still on the meta device.*Build it after to_empty"):
        optimizer.step()


def test_parameters_replaced_by_fully_shard_are_stale():
    def body(_):
        model = linear()
        optimizer = shardopt.AdamW(model.parameters())
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        give(model, 0)
        with pytest.warns(UserWarning, match="trains nothing"):
            optimizer.step()

    run_threaded(1, body)  # one: warnings are caught for the whole process


def test_a_first_step_without_gradients_is_no_reason_to_warn(recwarn):
    model = linear()
    shardopt.AdamW(model.parameters()).step()
    assert not recwarn.list


def test_a_model_half_on_meta_is_refused():
    """Kills: KeyError after half of the parameters were written."""
    a, b = linear(), linear("meta")
    optimizer = shardopt.AdamW([*a.parameters(), *b.parameters()])
    give(a, 0)
    before = [p.detach().clone() for p in a.parameters()]
    with pytest.raises(ValueError, match="other parameters are still on the meta device"):
        optimizer.step()
    assert same(before, [p.detach() for p in a.parameters()])


def test_fresh_state_follows_its_parameters():
    """A look, then the model changes dtype: state is made again; after a step it is not. Kills: stale fresh state,
    later state lost."""
    model = linear()
    optimizer = shardopt.AdamW(model.parameters(), rounding="kahan")
    assert "kahan.compensation.bf16" not in optimizer.state[model[0].weight]
    model.bfloat16()
    give(model, 0)
    optimizer.step()
    assert "kahan.compensation.bf16" in optimizer.state[model[0].weight]
    kept = optimizer.state[model[0].weight]["exp_avg.sqrt8"].data_ptr()
    for change in (model.bfloat16, model.float):
        change()
        give(model, 1)
        optimizer.step()
        assert optimizer.state[model[0].weight]["exp_avg.sqrt8"].data_ptr() == kept


FIRST = {  # rules whose first step is special, or whose state would show that one more was taken
    "adamw": lambda p: shardopt.AdamW(p, lr=0.01, rounding="stochastic"),
    "adafactor": lambda p: shardopt.Adafactor(p, lr=0.01, beta1=0.9),
    "dampening": lambda p: shardopt.SGD(p, lr=0.01, momentum=0.9, dampening=0.5),
    "lion": lambda p: shardopt.Lion(p, lr=0.01, state={"exp_avg": "bf16(rounding='stochastic')"}),
}


def initialise(optimizer):
    """What torchtitan and older DCPs do: zero gradients, lr 0, one step, everything back."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step(closure=None)
    optimizer.zero_grad(set_to_none=True)
    for group, lr in zip(optimizer.param_groups, rates):
        group["lr"] = lr


@pytest.mark.parametrize("sharded", [False, True], ids=["plain", "fsdp"])
@pytest.mark.parametrize("name", FIRST)
def test_the_initialisation_step_leaves_no_trace(name, sharded):
    """P32. Zero gradients at lr 0 on a fresh optimizer, also twice, also by torch itself. Kills: a counter of 1, a
    noise drawn, a first moment that was dampened."""

    def body(_=0):
        ends = []
        for how in (None, initialise, lambda o: [initialise(o), initialise(o)], _init_optim_state):
            model = linear(dtype=torch.bfloat16)
            if sharded:
                fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
            fill(model)
            optimizer = FIRST[name](model.parameters())
            if how:
                how(optimizer)
                assert all(float(optimizer.state[p]["step"]) == 0 for p in model.parameters())
            for step in range(3):
                give(model, step)
                optimizer.step()
            ends.append(locals_of(optimizer))
        assert all(same(ends[0], end) for end in ends)

    run_threaded(2, body) if sharded else body()


@pytest.mark.parametrize("rank", [0, 1])
def test_warm_up_from_zero_counts(rank):
    """A first step at lr 0 with a real gradient, on one rank only: it counts on all, as in torch. Kills: deciding
    from the local gradient."""

    def body(here):
        p = nn.Parameter(torch.ones(2, 4))
        p = nn.Parameter(DTensor.from_local(p.data[here : here + 1], init_device_mesh("cpu", (2,)), [Shard(0)]))
        optimizer = shardopt.AdamW([p], lr=0.0, state="fp32")
        p.grad = torch.zeros_like(p)
        p.grad._local_tensor.fill_(1.0 if here == rank else 0.0)
        optimizer.step()
        state = optimizer.state[p]
        assert float(state["step"]) == 1 and p._local_tensor.equal(torch.ones(1, 4))
        assert bool(state["exp_avg"]._local_tensor.any()) == (here == rank)

    run_threaded(2, body)


def test_a_zero_gradient_at_another_lr_counts():
    p = nn.Parameter(torch.ones(3))
    optimizer = shardopt.AdamW([p], lr=0.1, weight_decay=0.5)
    p.grad = torch.zeros(3)
    optimizer.step()
    assert float(optimizer.state[p]["step"]) == 1 and p[0].item() == pytest.approx(0.95)


def test_state_is_the_same_on_every_rank_and_mesh():
    """P25, P37. Names, global shapes and dtypes for 1 to 4 ranks, gradless parameters included."""

    def body(_, size):
        model = linear()
        fully_shard(model, mesh=init_device_mesh("cpu", (size,)))
        optimizer = shardopt.AdamW(model.parameters(), state="int4", rounding="stochastic")
        params = list(model.parameters())
        return [{n: (tuple(x.shape), x.dtype) for n, x in optimizer.state[p].items()} for p in params]

    model = linear()
    optimizer = shardopt.AdamW(model.parameters(), state="int4", rounding="stochastic")
    expected = [{n: (tuple(x.shape), x.dtype) for n, x in optimizer.state[p].items()} for p in model.parameters()]
    for size in (1, 2, 3, 4):
        assert run_threaded(size, lambda rank, size=size: body(rank, size)) == [expected] * size
