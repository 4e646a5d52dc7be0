"""Add-ons: a few lines each, at one declared stage."""

from shardopt.addons.base import Addon
from shardopt.addons.decay import CautiousDecay, WeightDecay
from shardopt.addons.gradient import ClipByGlobalNorm, CoupledDecay, GradientCentralization, OrthoGrad
from shardopt.addons.update import Cautious, Grams, RMSClip
from shardopt.addons.variance import Mars

ADDONS: dict[str, type[Addon]] = {
    addon.name: addon
    for addon in (
        ClipByGlobalNorm,
        CoupledDecay,
        GradientCentralization,
        OrthoGrad,
        Mars,
        Grams,
        RMSClip,
        Cautious,
        WeightDecay,
        CautiousDecay,
    )
}

__all__ = [
    "ADDONS",
    "Addon",
    "Cautious",
    "CautiousDecay",
    "ClipByGlobalNorm",
    "CoupledDecay",
    "GradientCentralization",
    "Grams",
    "Mars",
    "OrthoGrad",
    "RMSClip",
    "WeightDecay",
]
