"""shardopt: a distributed sharded optimizer runtime for FSDP2 and DTensor, with quantized states."""

from shardopt.addons import (
    Cautious,
    CautiousDecay,
    ClipByGlobalNorm,
    CoupledDecay,
    GradientCentralization,
    Grams,
    Mars,
    OrthoGrad,
    RMSClip,
    WeightDecay,
)
from shardopt.dtensor.checkpoint import load_checkpoint, save_checkpoint
from shardopt.optimizer import ShardedOptimizer
from shardopt.presets import SGD, Adafactor, Adam, AdaMuon, AdamW, Lion, Muon, NorMuon, RMSprop
from shardopt.recipe import Recipe
from shardopt.report import StateBytes, state_bytes
from shardopt.routing import build_optimizer, roles

__version__ = "0.1.0"

__all__ = [
    "SGD",
    "AdaMuon",
    "Adafactor",
    "Adam",
    "AdamW",
    "Cautious",
    "CautiousDecay",
    "ClipByGlobalNorm",
    "CoupledDecay",
    "GradientCentralization",
    "Grams",
    "Lion",
    "Mars",
    "Muon",
    "NorMuon",
    "OrthoGrad",
    "RMSClip",
    "RMSprop",
    "Recipe",
    "ShardedOptimizer",
    "StateBytes",
    "WeightDecay",
    "build_optimizer",
    "load_checkpoint",
    "roles",
    "save_checkpoint",
    "state_bytes",
]
