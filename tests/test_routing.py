"""Roles of a model's parameters, and one optimizer for all of them."""

import pytest
import torch
from torch import nn

import shardopt
from launch.config import Config
from launch.model import Decoder
from tests.virtual import bits


class Model(nn.Module):
    """What names and owners must tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(50, 32)
        self.pos_embed = nn.Parameter(torch.zeros(16, 32))
        self.qkv = nn.Linear(32, 96)
        self.norm = nn.LayerNorm((8, 32))
        self.conv = nn.Conv2d(8, 16, 3)
        self.experts = nn.Parameter(torch.zeros(4, 32, 48))
        self.thin = nn.Parameter(torch.zeros(3, 64))
        self.long = nn.Parameter(torch.zeros(4, 1024))
        self.output = nn.ModuleDict({"output": nn.Linear(32, 32, bias=False)})
        self.lm_head = nn.Linear(32, 50, bias=False)
        self.frozen = nn.Parameter(torch.zeros(32, 32), requires_grad=False)


ROLES = {
    "embed_tokens.weight": "embedding",
    "pos_embed": "matrix",
    "qkv.weight": "matrix",
    "qkv.bias": "vector",
    "norm.weight": "vector",
    "norm.bias": "vector",
    "conv.weight": "matrix",
    "conv.bias": "vector",
    "experts": "matrix",
    "thin": "vector",
    "long": "vector",
    "output.output.weight": "matrix",
    "lm_head.weight": "head",
}


def test_roles():
    """Kills: a norm's matrix, a position's embedding, a layer called output or a thin matrix sent astray."""
    assert shardopt.roles(Model()) == ROLES


def test_tied_weights_are_an_embedding_once():
    """Also under a name that tells nothing. Kills: the last owner, or the name, taken for the role."""
    model = nn.ModuleDict({"tokens": nn.Embedding(50, 32), "lm_head": nn.Linear(32, 50, bias=False)})
    model["lm_head"].weight = model["tokens"].weight
    assert shardopt.roles(model) == {"tokens.weight": "embedding"}


def test_views_that_the_module_does_not_mean():
    """Kills: a kernel taken for a stack of matrices, experts of rank 16 taken for one matrix, a whole embedder for an
    embedding."""
    model = nn.Module()
    model.patches = nn.Conv2d(3, 64, 32, 32, bias=False)
    model.sequence = nn.Conv1d(48, 64, 128, bias=False)
    model.adapters = nn.Parameter(torch.zeros(8, 64, 16))
    model.embedder = nn.Sequential(nn.Linear(16, 16, bias=False))
    model.embedder.inner = nn.Linear(16, 16, bias=False)
    assert list(shardopt.roles(model).values()) == ["vector", "vector", "vector", "matrix", "matrix"]


@pytest.mark.parametrize("name", ["out", "unembed", "embed_out", "to_logits"])
def test_a_head_by_any_name(name):
    """Named like one, or with as many rows as the vocabulary. Kills: a head sent to Muon without a word, its own rate
    read by nobody; a square matrix in a block of as many rows, or one of two, taken for a head."""
    model = nn.ModuleDict({"tok": nn.Embedding(64, 64), "blocks": nn.ModuleList([nn.Linear(64, 64, bias=False)])})
    model[name] = nn.Linear(64, 64, bias=False)
    assert list(shardopt.roles(model).values()) == ["embedding", "matrix", "head"]
    opt = shardopt.build_optimizer(model, "muon", lr=0.02, head_lr=0.3)
    assert [group["lr"] for group in opt.param_groups] == [0.02, 0.02, 0.3]
    two = nn.ModuleDict({"tok": nn.Embedding(64, 64), "one": nn.Linear(64, 64, False), "two": nn.Linear(64, 64, False)})
    assert list(shardopt.roles(two).values()) == ["embedding", "matrix", "matrix"]


def test_options_of_a_role_that_nobody_has():
    """Kills: a rate that nothing reads, or a misspelt one, without a word."""
    model = nn.Sequential(nn.Linear(40, 96, bias=False))
    with pytest.warns(UserWarning, match="no parameter has the role head, so nothing reads head_lr, head_state"):
        shardopt.build_optimizer(model, lr=0.1, head_lr=0.2, head_state="fp32")
    with pytest.raises(ValueError, match="'lrr' is neither an option of adamw"):
        shardopt.build_optimizer(model, lr=0.1, head_lrr=0.2)
    with pytest.raises(ValueError, match="did you mean 'embedding_lr'"):
        shardopt.build_optimizer(model, lr=0.1, embeding_lr=0.2)
    with pytest.raises(ValueError, match="model is a generator; give the module itself"):
        shardopt.build_optimizer(model.parameters(), lr=0.1)


def test_options_meet_the_real_parameters():
    """Kills: options tried on a stand-in's shape."""
    model = nn.Sequential(nn.Linear(40, 96, bias=False))
    assert shardopt.build_optimizer(model, "Muon", lr=0.1, split=[32, 64]).param_groups[0]["split"] == (32, 64)
    with pytest.raises(ValueError, match=r"0\.weight has 96 rows"):
        shardopt.build_optimizer(model, lr=0.1, split=50)


def test_splits_by_name():
    """Fused q, k, v and heads where they are, other matrices whole. Kills: blocks of another pattern's, a pattern that
    matches nothing or only a vector, a matrix in no group or in two."""
    splits = {"qkv.*": [32, 32, 32], "*experts": 16, "pos_*": 16}
    opt = shardopt.build_optimizer(Model(), "muon", lr=0.1, split=splits)
    groups = [(g["param_names"], g["split"]) for g in opt.param_groups if g["role"] == "matrix"]
    assert groups == [
        (["conv.weight", "output.output.weight"], None), (["pos_embed", "experts"], 16), (["qkv.weight"], (32, 32, 32)),
    ]  # fmt: skip
    names = [name for group in opt.param_groups for name in group["param_names"]]
    assert sorted(names) == sorted(ROLES)
    with pytest.raises(ValueError, match=r"no matrix is named like 'qvk.weight'.*; did you mean 'qkv.weight'"):
        shardopt.build_optimizer(Model(), "muon", lr=0.1, split={"qvk.weight": 32})
    with pytest.raises(ValueError, match=r"no matrix is named like '\*qkv'.*; did you mean '\*qkv\.\*'"):
        shardopt.build_optimizer(Model(), "muon", lr=0.1, split={"*qkv": 32})
    with pytest.raises(ValueError, match=r"qkv\.weight has 96 rows, but split=\(32, 32\) adds up to 64"):
        shardopt.build_optimizer(Model(), "muon", lr=0.1, split={"qkv.*": (32, 32)})
    with pytest.raises(ValueError, match=r"no matrix is named like '\*\.bias'"):
        shardopt.build_optimizer(Model(), "muon", lr=0.1, split={"*.bias": 32})
    with pytest.raises(ValueError, match=r"conv\.weight has 16 rows, which split=5 does not divide"):
        shardopt.build_optimizer(Model(), "muon", lr=0.1, split={"conv.*": 5})


def test_overrides():
    found = shardopt.roles(Model(), {"pos_*": "embedding", "output.*": "head", "*": "vector"})
    assert (found["pos_embed"], found["output.output.weight"], found["qkv.weight"]) == ("embedding", "head", "vector")
    with pytest.raises(ValueError, match="no parameter is named like 'layers"):
        shardopt.roles(Model(), {"layers.*": "matrix"})
    with pytest.raises(ValueError, match=r"the role of 'conv\.\*' is 'nd'; it must be one of matrix"):
        shardopt.roles(Model(), {"conv.*": "nd"})


def test_one_optimizer_for_all():
    """Every parameter once, in the group of its role; a schedule, a state dict for all. Kills: decay on vectors, one
    rate for all where a role has its own, options of one role read by another."""
    model = Model()
    opt = shardopt.build_optimizer(
        model, "muon", lr=0.02, weight_decay=0.1, wire="exact", embedding_lr=0.3, vector_betas=(0.8, 0.9), aux_eps=1e-6
    )
    groups = {group["role"]: group for group in opt.param_groups}
    assert {name: group["role"] for group in opt.param_groups for name in group["param_names"]} == ROLES
    assert [groups[role]["lr"] for role in ("matrix", "embedding", "head", "vector")] == [0.02, 0.3, 0.02, 0.02]
    assert [groups[role]["weight_decay"] for role in ("matrix", "embedding", "head", "vector")] == [0.1, 0, 0, 0]
    assert groups["vector"]["betas"] == (0.8, 0.9) and groups["head"]["betas"] == (0.9, 0.999)
    assert groups["head"]["eps"] == 1e-6
    recipes = dict(zip(groups, opt.recipes))
    assert recipes["matrix"].rule.adjust_lr == "match_rms_adamw" and recipes["matrix"].rule.wire == "exact"
    assert recipes["embedding"].rule.name == "adamw" and recipes["embedding"].key().startswith("adamw/fp32,fp32")
    schedule = torch.optim.lr_scheduler.LambdaLR(opt, lambda step: 0.5**step)
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    opt.step()
    schedule.step()
    assert [group["lr"] for group in opt.param_groups] == [0.01, 0.15, 0.01, 0.01]
    again = shardopt.build_optimizer(model, "muon", lr=1.0, wire="exact")
    again.load_state_dict(opt.state_dict())
    assert again.param_groups[1]["lr"] == 0.15


@pytest.mark.parametrize("name, aux", [("adamw", "adamw"), ("normuon", "lion"), ("adamuon", "adamw")])
def test_other_optimizers(name, aux):
    opt = shardopt.build_optimizer(Model(), name, lr=0.01, aux=aux)
    assert {recipe.rule.name for recipe in opt.recipes} == {name, aux}


def test_bad_options_say_what_to_do():
    with pytest.raises(ValueError, match="no optimizer is named 'mion'"):
        shardopt.build_optimizer(Model(), "mion", lr=0.01)
    with pytest.raises(ValueError, match="'wires' is neither an option of muon nor one of a role"):
        shardopt.build_optimizer(Model(), "muon", lr=0.01, wires="exact")


def test_equals_optimizers_apart():
    """One optimizer steps as Muon on matrices and AdamW on the rest do. Kills: groups that share numbers."""

    def model():
        torch.manual_seed(1)
        made = Decoder(Config(zero_init=False, zero_head=False))
        for i, p in enumerate(made.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
        return made

    one, two = model(), model()
    roles = shardopt.roles(two)
    matrices = [p for name, p in two.named_parameters() if roles[name] == "matrix"]
    rest = [p for name, p in two.named_parameters() if roles[name] != "matrix"]
    opts = [
        shardopt.build_optimizer(one, lr=0.02, weight_decay=0.1),
        shardopt.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        shardopt.AdamW(rest, lr=0.02, weight_decay=0.0, state="fp32"),
    ]
    for _ in range(3):
        for opt in opts:
            opt.step()
    for p, q in zip(one.parameters(), two.parameters()):
        assert bits(p.detach()).equal(bits(q.detach()))
