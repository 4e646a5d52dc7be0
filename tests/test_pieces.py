"""A large parameter is stepped in pieces of rows: the same bits, and only where nothing is asked."""

from itertools import product

import pytest
import torch
from torch import nn

import shardopt
from shardopt import item as items
from shardopt.codecs import codec
from shardopt.codecs.geometry import Geometry
from tests.table import RULES, STATES, Case
from tests.test_virtual import compare, run_case
from tests.virtual import Axis

MESHES = ((), (Axis(3, 0),), (Axis(2, 0, stripes=3),), (Axis(2, 1),), (Axis(2, 0), Axis(2, 1)))
SHAPES = ((70, 130), (4, 32, 48), (66, 9, 3, 3), (12, 512), (700,))
CUTTABLE = [name for name, rule in RULES.items() if not rule().asks]


def cuts_of(state):
    """The shapes and meshes that this state may have."""
    for shape, mesh in product(SHAPES, MESHES):
        halves = "4" in state and len(shape) > 1 and shape != (12, 512)  # no byte of two columns may lie on two ranks
        if all(axis.dim < len(shape) and not (halves and axis.dim == 1) for axis in mesh):
            yield shape, mesh


@pytest.mark.parametrize("rule", CUTTABLE)
@pytest.mark.parametrize("state", STATES)
def test_pieces_have_the_bits_of_the_whole(rule, state, monkeypatch):
    """Every rule with every state on some shapes and meshes; each of those with every state, and with every rule.
    Kills: noise or blocks by the row of the piece, a step count that advances once a piece, a part not cut along."""
    first = (CUTTABLE.index(rule) + list(STATES).index(state)) % 5
    for shape, mesh in list(cuts_of(state))[first::5]:
        case = Case(rule, state, "decay", "stochastic", "bf16", "fresh", shape)
        monkeypatch.setattr(items, "CPU_PIECE", 1 << 40)
        whole = run_case(case, mesh)
        monkeypatch.setattr(items, "CPU_PIECE", 300)
        compare(whole, run_case(case, mesh), exact=True)


def test_who_is_cut():
    """Kills: cutting a parameter whose statistics its rule, an add-on or a codec asks (each piece would have one)."""
    p = nn.Parameter(torch.randn(512, 256))

    def count(kind=shardopt.AdamW, **options):
        opt = kind([p], **options)
        p.grad = torch.ones_like(p)
        opt.make_states()
        return len(items.pieces(opt.items()[0]))

    assert count() == 2
    assert count(state="fp32", addons=["grams", "clip_by_global_norm"]) == 2
    assert count(shardopt.Adafactor, state="fp32") == 1
    assert count(state="factored") == count(addons=["cautious"]) == count(addons=["orthograd"]) == 1
    assert count(addons=["rms_clip"]) == count(addons=["gradient_centralization"]) == 1


def test_straddling_blocks_are_asked():
    geo = Geometry((8, 512), (((0, 8),), ((0, 300),)), ((), (300,)))
    assert codec("int8").asks(geo) and codec("log8").asks(geo) and codec("factored").asks(geo)
    assert not codec("fp32").asks(geo) and not codec("bf16").asks(geo)
    assert not codec("int8(block=128)").asks(Geometry((8, 512), (((0, 8),), ((0, 256),)), ((), (256,))))


def test_a_rule_that_asks_without_saying_so_is_caught(monkeypatch):
    monkeypatch.setattr(items, "CPU_PIECE", 300)
    monkeypatch.setattr(shardopt.Cautious, "asks", False)
    p = nn.Parameter(torch.randn(64, 64))
    opt = shardopt.AdamW([p], addons=["cautious"], fused=False)
    p.grad = torch.randn_like(p)
    with pytest.raises(AssertionError, match="asks nothing"):
        opt.step()
