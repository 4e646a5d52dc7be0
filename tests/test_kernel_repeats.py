"""What a repeated step reads anew: loaded state, totals, phases; and that torch.compile leaves it alone."""

import pytest
import torch
from torch import nn

import shardopt
from shardopt import Recipe, ShardedOptimizer, rules
from tests.test_kernel_replay import equal, pair, step

pytestmark = pytest.mark.usefixtures("walking")


def test_reloaded_state_is_what_steps(taken):
    """In place or not: what load_state_dict brought is read by the next step. Kills: a call made for the old state."""
    results = pair()
    for opt in results:
        step(opt, 0)
        step(opt, 1)
        saved = {k: v for k, v in opt.state_dict().items()}
        saved = torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, saved)
        step(opt, 2)
        opt.load_state_dict(saved)
        step(opt, 3)
        step(opt, 4)
    equal(*results)


def test_asked_numbers_are_asked_in_every_step(taken):
    """The global norm of the last step must not clip this one. Kills: a Total that is replayed."""
    results = pair(addons=["clip_by_global_norm"])
    for opt in results:
        for seed in range(3):
            step(opt, seed)
    assert taken == [True] * 2
    equal(*results)


def test_a_period_goes_on_where_nobody_asks(taken):
    """Matrices without gradients for a while, vectors beside them. Kills: a phase that only full steps count."""

    def phases(fused):
        p, q = nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))
        periodic = Recipe(rules.Muon(mode="periodic", period=3))
        opt = ShardedOptimizer(
            [{"params": [p], "recipe": periodic}, {"params": [q]}], Recipe(rules.AdamW()), fused=fused
        )
        found = []
        for _ in range(5):
            q.grad = torch.ones(8)
            opt.step()
            found.append(opt.param_groups[0]["phase"])
        return found

    assert phases(None) == phases(False) == [1, 2, 0, 1, 2] and taken == [True] * 4


def test_a_compiled_training_step(taken):
    """torch.compile around forward, backward and step: at most a graph break. Kills: a step that dynamo traces into."""

    def run(compiled):
        torch.manual_seed(0)
        model = nn.Linear(64, 64)
        opt = shardopt.AdamW(model.parameters(), lr=1e-2)

        def train(x):
            opt.zero_grad()
            model(x).square().mean().backward()
            opt.step()

        step = torch.compile(train, backend="eager") if compiled else train
        for seed in range(3):
            torch.manual_seed(seed)
            step(torch.randn(8, 64))
        return opt

    equal(run(True), run(False))
    assert taken == [True] * 4
