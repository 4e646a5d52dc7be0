"""An optimizer that was pickled, copied or loaded continues as if it had not been, bit by bit."""

import copy
import io
import pickle

import pytest
import torch

import shardopt
from tests.small import close, give, params, same, train


def everything(optimizer):
    return [value for p in optimizer.param_groups[0]["params"] for value in optimizer.state[p].values()]


@pytest.mark.parametrize("state", ["fp32", "bf16", "int8", "int4", "factored"])
@pytest.mark.parametrize("how", ["pickle", "deepcopy", "state_dict", "torch.save"])
def test_copies_continue_bitwise(how, state):
    """P28, P30. bf16 parameters, stochastic rounding, every preset. Kills: state cast to the parameter's dtype, a
    noise key or step that is not saved."""
    ps = params(dtype=torch.bfloat16)
    optimizer = shardopt.AdamW(ps, lr=0.02, state=state, rounding="stochastic", seed=3)
    train(optimizer, ps, 3)
    if how in ("pickle", "deepcopy"):
        both = (optimizer, ps)
        other, qs = pickle.loads(pickle.dumps(both)) if how == "pickle" else copy.deepcopy(both)
        assert isinstance(other.state, type(optimizer.state)) and other.param_groups[0]["params"][0] is qs[0]
    else:
        qs = [torch.nn.Parameter(p.detach().clone()) for p in ps]
        other = shardopt.AdamW(qs, lr=0.5, state=state, rounding="stochastic", seed=77)
        saved = optimizer.state_dict()
        if how == "torch.save":
            file = io.BytesIO()
            torch.save(saved, file)
            file.seek(0)
            saved = torch.load(file, weights_only=True)
        other.load_state_dict(saved)
    assert same(everything(other), everything(optimizer)) and other.param_groups[0]["lr"] == 0.02
    storages = {x.data_ptr() for x in everything(optimizer)}
    assert not storages & {x.data_ptr() for x in everything(other)}
    train(optimizer, ps, 3, first=3)
    train(other, qs, 3, first=3)
    assert same(ps, qs)


def test_load_keeps_dtype_and_value():
    """P29. Scale 1.2345678 and counter 257 with bf16 parameters. Kills: torch's cast on load (1.2344, 256)."""
    ps, qs = params(dtype=torch.bfloat16), params(dtype=torch.bfloat16)
    a, b = shardopt.AdamW(ps), shardopt.AdamW(qs)
    state = a.state[ps[1]]
    state["exp_avg.sqrt8_scale"].fill_(1.2345678)
    state["exp_avg.sqrt8"].fill_(-56)
    state["step"].fill_(257)
    b.load_state_dict(a.state_dict())
    assert float(b.state[qs[1]]["exp_avg.sqrt8_scale"][0, 0]) == float(torch.tensor(1.2345678))
    assert b.state[qs[1]]["exp_avg.sqrt8"].dtype == torch.int8 and int(b.state[qs[1]]["exp_avg.sqrt8"][0, 0]) == -56
    assert float(b.state[qs[1]]["step"]) == 257


def test_loads_what_torch_saved():
    """A torch.optim.AdamW state dict continues under state="fp32", also one with parameters that had no gradient."""
    ps, qs = params(), params()
    ps[2].requires_grad_(False)
    qs[2].requires_grad_(False)
    a, b = shardopt.AdamW(ps, lr=9.0, state="fp32"), torch.optim.AdamW(qs, lr=0.03, betas=(0.8, 0.99))
    train(b, [qs[0], qs[1]], 4)
    with torch.no_grad():
        for p, q in zip(ps, qs):
            p.copy_(q)
    a.load_state_dict(b.state_dict())
    assert a.param_groups[0]["betas"] == (0.8, 0.99) and a.param_groups[0]["lr"] == 0.03
    for i in range(4, 8):
        for optimizer, x in ((a, ps), (b, qs)):
            give([x[0], x[1], x[3]], i)
            optimizer.step()
    assert close(ps, qs)


def test_load_refuses_what_does_not_fit():
    """Before anything is changed, in words. Kills: a partial load, adopted numbers, an adopted recipe."""
    ps = params()
    saved = shardopt.AdamW(params(), state="fp32").state_dict()
    optimizer = shardopt.AdamW(ps, state="int8")
    train(optimizer, ps, 1)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"saved with recipe .*fp32.* this optimizer has .*sqrt8"):
        optimizer.load_state_dict(saved)
    with pytest.raises(ValueError, match="parameters, here it has"):
        optimizer.load_state_dict(shardopt.AdamW(params()[:2]).state_dict())
    other = copy.deepcopy(before)
    other["param_groups"][0]["lr"] = 7.0
    other["state"][0]["step"].fill_(9.0)
    broken = copy.deepcopy(other)
    broken["state"][1]["exp_avg.sqrt8"] = broken["state"][1]["exp_avg.sqrt8"].to(torch.uint8)
    with pytest.raises(ValueError, match=r"uint8.*int8"):
        optimizer.load_state_dict(broken)
    broken = copy.deepcopy(other)
    del broken["state"][1]["exp_avg.sqrt8_scale"]
    with pytest.raises(ValueError, match="this optimizer stores"):
        optimizer.load_state_dict(broken)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert all(same(a.values(), b.values()) for a, b in zip(before["state"].values(), after["state"].values()))
