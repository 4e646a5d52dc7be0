"""Update rules: one small file a family."""

from shardopt.rules.adafactor import Adafactor
from shardopt.rules.adam import AdamW
from shardopt.rules.adaptive_muon import AdaMuon, NorMuon
from shardopt.rules.base import Hyper, Rule
from shardopt.rules.muon import Muon
from shardopt.rules.sgd import SGD, RMSprop
from shardopt.rules.sign import Lion

EVERY: tuple[type[Rule], ...] = (AdamW, Lion, SGD, RMSprop, Adafactor, Muon, NorMuon, AdaMuon)
RULES: dict[str, type[Rule]] = {rule.name: rule for rule in EVERY}

__all__ = ["RULES", "SGD", "AdaMuon", "Adafactor", "AdamW", "Hyper", "Lion", "Muon", "NorMuon", "RMSprop", "Rule"]
