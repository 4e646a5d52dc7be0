"""Options of Muon in a param group: torch.optim.Muon's names too; recipes there are objects."""

import pytest
import torch

import shardopt
from shardopt import Recipe, rules
from tests.table import gradients, weights

SHAPE = (48, 96)
OPTIONS = (
    {"adjust_lr_fn": "match_rms_adamw"},
    {"ns_steps": 3},
    {"ns_coefficients": (2.0, -1.5, 0.5)},
    {"nesterov": False, "ns_steps": 4},
)


def stepped(make):
    """A matrix after two steps of the optimizer that `make` makes for it."""
    p = torch.nn.Parameter(weights(SHAPE))
    optimizer = make(p)
    for g in gradients(SHAPE, 2):
        p.grad = g
        optimizer.step()
    return p.data, optimizer


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: " ".join(options))
def test_a_group_may_say_what_the_constructor_may(options):
    """As with torch.optim.Muon. Kills: names of torch's in a group that nobody reads, and each of them left out."""
    own, _ = stepped(lambda p: shardopt.Muon([{"params": [p], **options}]))
    same, _ = stepped(lambda p: shardopt.Muon([p], **options))
    other, _ = stepped(lambda p: shardopt.Muon([p]))
    assert own.equal(same)
    assert not own.equal(other)


def test_a_group_without_an_adjustment_has_the_original_one():
    """Kills: None in a group taken for nothing said."""
    own, _ = stepped(lambda p: shardopt.Muon([{"params": [p], "adjust_lr_fn": None}], adjust_lr_fn="match_rms_adamw"))
    assert own.equal(stepped(lambda p: shardopt.Muon([p]))[0])


def test_eps_is_the_iterations_but_in_normuon_that_of_its_second_moment():
    """Its number of this name. Kills: `eps` that nobody reads, or that is taken for the iteration's in every rule."""
    _, optimizer = stepped(lambda p: shardopt.Muon([{"params": [p], "eps": 1e-3}]))
    assert optimizer.recipes[0].rule.orthogonalizer == "newton_schulz(eps=0.001)"
    _, optimizer = stepped(lambda p: shardopt.NorMuon([{"params": [p], "eps": 1e-3}]))
    assert optimizer.param_groups[0]["eps"] == 1e-3
    assert optimizer.recipes[0].rule.orthogonalizer == rules.NorMuon().orthogonalizer


def test_newton_schulz_options_for_another_iteration_are_refused():
    p = torch.nn.Parameter(weights(SHAPE))
    with pytest.raises(ValueError, match="belong to a Newton-Schulz"):
        shardopt.Muon([{"params": [p], "ns_steps": 4}], orthogonalizer="gram")


def test_a_recipe_by_name_is_refused():
    """Kills: a text that is dropped, so that an embedding is orthogonalized; one of the group's own refused too."""
    p, q = (torch.nn.Parameter(weights(SHAPE)) for _ in range(2))
    with pytest.raises(ValueError, match="give the recipe itself"):
        shardopt.Muon([{"params": [p]}, {"params": [q], "recipe": "adamw"}])
    optimizer = shardopt.Muon([{"params": [p]}, {"params": [q], "recipe": Recipe(rules.AdamW(), "fp32")}])
    assert [group["recipe"].split("/")[0] for group in optimizer.param_groups] == ["muon", "adamw"]
    again = shardopt.Muon(shardopt.Muon([p]).param_groups)
    assert again.param_groups[0]["recipe"] == optimizer.param_groups[0]["recipe"]
