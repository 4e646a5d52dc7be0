"""shardopt: a distributed sharded optimizer runtime for FSDP2 and DTensor, with quantized states."""

from shardopt.addons import (
    Cautious,
    CautiousDecay,
    ClipByGlobalNorm,
    CoupledDecay,
    GradientCentralization,
    Grams,
    OrthoGrad,
    RMSClip,
    WeightDecay,
)
from shardopt.dtensor.checkpoint import load_checkpoint, save_checkpoint
from shardopt.optimizer import ShardedOptimizer
from shardopt.presets import SGD, Adafactor, Adam, AdamW, Lion, RMSprop
from shardopt.recipe import Recipe
from shardopt.report import StateBytes, state_bytes

__version__ = "0.1.0"

__all__ = [
    "SGD",
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
    "OrthoGrad",
    "RMSClip",
    "RMSprop",
    "Recipe",
    "ShardedOptimizer",
    "StateBytes",
    "WeightDecay",
    "load_checkpoint",
    "save_checkpoint",
    "state_bytes",
]
