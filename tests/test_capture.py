"""A step that a CUDA graph cannot hold is refused in words (the check itself needs no GPU)."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt.capture import check_capture


class OnDevice(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda")


def job(lr):
    p = nn.Parameter(torch.ones(3))
    return p, shardopt.SGD([p], lr=lr)


def test_refusals():
    """Kills: the first group alone checked, a tensor on the CPU let through, a frozen parameter refused."""
    lr = torch.tensor(0.1).as_subclass(OnDevice)
    p, opt = job(0.1)
    with pytest.raises(ValueError, match="reads it on the device"):
        check_capture(opt.param_groups, {p: True})
    opt.param_groups[0]["lr"] = lr
    with pytest.raises(ValueError, match=r"param_groups\[0\]\.params\[0\] has no state.*take one step before"):
        check_capture(opt.param_groups, {p: False})
    with pytest.raises(ValueError, match=r"param_groups\[0\]\.params\[0\] has no gradient.*set_to_none=False"):
        check_capture(opt.param_groups, {p: True})
    p.grad = torch.ones(3)
    frozen = nn.Parameter(torch.ones(3), requires_grad=False)
    opt.add_param_group({"params": [frozen], "lr": lr})
    check_capture(opt.param_groups, {p: True, frozen: False})
    opt.param_groups[1]["lr"] = torch.tensor(0.1)
    with pytest.raises(ValueError, match=r"param group 1 .*reads it on the device"):
        check_capture(opt.param_groups, {p: True, frozen: False})


def test_step_checks_while_capturing(monkeypatch):
    """Kills: a check that step never calls."""
    p, opt = job(0.1)
    p.grad = torch.ones(3)
    monkeypatch.setattr("shardopt.optimizer.capturing", lambda: True)
    with pytest.raises(ValueError, match="reads it on the device"):
        opt.step()
    assert p.equal(torch.ones(3))
