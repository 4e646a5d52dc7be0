"""Familiar names and signatures over recipes: changing the import is enough."""

from shardopt.presets.base import SHARED, Preset
from shardopt.presets.muon import AdaMuon, Muon, NorMuon
from shardopt.presets.torchs import SGD, Adafactor, Adam, AdamW, Lion, RMSprop

PRESETS: dict[str, type[Preset]] = {
    "adamw": AdamW,
    "adam": Adam,
    "lion": Lion,
    "sgd": SGD,
    "rmsprop": RMSprop,
    "adafactor": Adafactor,
    "muon": Muon,
    "normuon": NorMuon,
    "adamuon": AdaMuon,
}
for preset in PRESETS.values():
    preset.__doc__ = (preset.__doc__ or "") + "\n" + SHARED

__all__ = ["PRESETS", "SGD", "AdaMuon", "Adafactor", "Adam", "AdamW", "Lion", "Muon", "NorMuon", "Preset", "RMSprop"]
