"""Warnings name the line of the user's script: that is where the mistake is, and Python shows a text once a line."""

from _thread import start_new_thread
from threading import Event

import pytest
import torch

import shardopt
from shardopt.telling import tell


def layer():
    return torch.nn.Linear(16, 16, bias=False)


def stepped_with(**numbers):
    model = layer()
    opt = shardopt.AdamW(model.parameters(), lr=0.1)
    model.weight.grad = torch.ones(16, 16)
    opt.step()
    opt.param_groups[0].update(numbers)
    opt.step()


def unread(folder):
    stepped_with(momentum=0.5)


def misspelt(folder):
    stepped_with(weigth_decay=0.5)


def scheduled(folder):
    """torch wraps `step` once more."""
    model = layer()
    opt = shardopt.AdamW(model.parameters(), lr=0.1)
    torch.optim.lr_scheduler.LambdaLR(opt, lambda _: 1.0)
    opt.param_groups[0]["momentum"] = 0.5
    model.weight.grad = torch.ones(16, 16)
    opt.step()


def no_such_role(folder):
    shardopt.build_optimizer(torch.nn.Sequential(layer()), lr=0.1, head_lr=0.2)


def surplus(folder):
    model = layer()
    shardopt.save_checkpoint(folder, model, shardopt.AdamW(model.parameters(), lr=0.1), step=1)
    less = torch.nn.Linear(16, 16, bias=True)
    shardopt.load_checkpoint(folder, less, shardopt.AdamW(less.parameters(), lr=0.1))


def loaded(folder):
    params = list(layer().parameters())
    saved = shardopt.SGD(params, lr=0.1, momentum=0.9, nesterov=True).state_dict()
    shardopt.SGD(params, lr=0.1, momentum=0.9).load_state_dict(saved)


@pytest.mark.parametrize("way", (unread, misspelt, scheduled, no_such_role, surplus, loaded))
def test_warnings_name_the_users_line(way, tmp_path):
    """Kills: a depth that is counted by hand, and is another where torch wraps a call or ours goes another way."""
    with pytest.warns(UserWarning) as told:
        way(tmp_path / "checkpoint")
    ours = [warning for warning in told if issubclass(warning.category, UserWarning)]
    assert all(warning.filename == __file__ for warning in ours), [(w.filename, str(w.message)) for w in ours]


def test_without_a_user():
    """On a thread that C began, as autograd's are. Kills: an AttributeError at the bottom of the stack."""
    inside = {"tell": tell, "__name__": "shardopt.made_up", "done": Event()}
    exec("def alone():\n    tell('alone')\n    done.set()", inside)
    with pytest.warns(UserWarning, match="alone"):
        start_new_thread(inside["alone"], ())
        assert inside["done"].wait(30)
