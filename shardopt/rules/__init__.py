"""Update rules: one small file a family."""

from shardopt.rules.adafactor import Adafactor
from shardopt.rules.adam import AdamW
from shardopt.rules.base import Hyper, Rule
from shardopt.rules.sgd import SGD, RMSprop
from shardopt.rules.sign import Lion

RULES: dict[str, type[Rule]] = {rule.name: rule for rule in (AdamW, Lion, SGD, RMSprop, Adafactor)}

__all__ = ["RULES", "SGD", "Adafactor", "AdamW", "Hyper", "Lion", "RMSprop", "Rule"]
