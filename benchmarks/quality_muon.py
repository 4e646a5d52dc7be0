"""Muon's contenders for benchmarks.quality: what its momentum's format, its wire and its variants cost."""

from typing import Any

import torch

import shardopt
from shardopt import Recipe, rules
from shardopt.codecs import CODECS
from tests.bad_codecs import Plain2, Plain3

INT8 = {"signed": "int8", "non_negative": "root4"}  # the preset's
INT4_GATHER = "int4(block=64)+bf16"
CODECS.update(plain2=Plain2, plain3=Plain3)  # a wire names its formats; these are only for controls


def muon(state: Any, wire: str, rule: type[rules.Muon] = rules.Muon, addons: Any = ("decay",), **options: Any) -> Any:
    """Matrices of the first group to Muon, whose rate is AdamW's by RMS; vectors, embedding and head to AdamW."""

    def make(groups: list[dict[str, Any]], at: Any) -> torch.optim.Optimizer:
        inner, outer = groups
        adjust = {} if rule is rules.AdaMuon else {"adjust_lr": "match_rms_adamw"}
        matrices = Recipe(rule(wire=wire, **adjust, **options), state, addons)
        rest = Recipe(rules.AdamW(betas=(0.9, at.beta2), eps=at.eps), "fp32", ("decay",))
        decay = {"weight_decay": at.weight_decay}
        return shardopt.ShardedOptimizer(
            [
                {**inner, **decay, "params": [p for p in inner["params"] if p.ndim > 1], "recipe": matrices},
                {**inner, "params": [p for p in inner["params"] if p.ndim < 2], "recipe": rest, "weight_decay": 0.0},
                {**outer, **decay, "recipe": rest},
            ]
        )

    return make


CONTENDERS = {
    "muon-fp32-exact": muon("fp32", "exact"),
    "muon-int8-exact": muon(INT8, "exact"),
    "muon-sqrt8-exact": muon("int8", "exact"),
    "muon-fp32-bf16": muon("fp32", "bf16"),
    "muon-fp32-int8": muon("fp32", "int8"),
    "muon-fp32-int8+int4": muon("fp32", "int8+int4"),
    "muon-int8-int8": muon(INT8, "int8"),
    "muon-int8-int8+int4": muon(INT8, "int8+int4"),
    "muon-int4-exact": muon("int4", "exact"),
    "control-muon-int4-gather": muon("fp32", INT4_GATHER),
    "control-muon-int4x128-gather": muon("fp32", "int4(block=128)+bf16"),
    "control-muon-3-bit-gather": muon("fp32", "plain3+bf16"),
    "control-muon-2-bit-gather": muon("fp32", "plain2+bf16"),
    "control-muon-2-bit-return": muon("fp32", "bf16+plain2"),
    "control-muon-int4-wire": muon("fp32", "int4(block=64)+int4(block=64)"),
    "control-muon-int4-state": muon({"signed": "int4", "non_negative": "root4"}, "exact"),
    "muon-minimax": muon("fp32", "exact", orthogonalizer="minimax"),
    "muon-fast": muon("fp32", "exact", orthogonalizer="fast"),
    "muon-normuon": muon("fp32", "exact", rules.NorMuon),
    "muon-adamuon": muon("fp32", "exact", rules.AdaMuon),
    "muon-mars": muon("fp32", "exact", addons=("mars", "decay")),
    "muon-cautious": muon("fp32", "exact", addons=("cautious_decay",)),
}
