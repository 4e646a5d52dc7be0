"""A recipe is rule, codecs, add-ons and write policy of one parameter group: data, checked when it is made."""

from dataclasses import dataclass, field, fields
from typing import Any

import torch

from shardopt.addons import ADDONS, Addon
from shardopt.addons.variance import beta_of
from shardopt.asks import Slot
from shardopt.codecs import Codec, codec
from shardopt.codecs.presets import resolve_state, split_outside
from shardopt.codecs.sendable import wire_codec
from shardopt.rules import Rule
from shardopt.spelling import choice, near, spelled
from shardopt.write import KAHAN_CODEC, WRITES, Nearest


@dataclass(frozen=True)
class Recipe:
    """What one parameter group does.

    rule: an update rule. state: see `shardopt.codecs.presets.resolve_state`. addons: objects or names; they run in
    their declared order, whatever the order given. rounding: "nearest", "stochastic" or "kahan". update_from:
    "fresh", the step uses the exact new state and only storage is rounded; "stored", it uses what will be read back.

    Numbers (lr, betas, ...) are only defaults here: the param group has the last word. ValueError on every
    combination that is undefined or would silently do nothing.
    """

    rule: Rule
    state: Any = "fp32"
    addons: Any = ()
    rounding: str = "nearest"
    update_from: str = "fresh"
    spec: Any = field(default=None, init=False, compare=False, repr=False)  # `state` as it was given

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise ValueError(f"rule is {self.rule!r}; give an object of shardopt.rules, such as AdamW()")
        put = object.__setattr__
        put(self, "addons", addons_of(self.addons))
        choice("rounding", self.rounding, WRITES)
        choice("update_from", self.update_from, ("fresh", "stored"))
        check_addons(self.rule, self.addons)
        for name in self.rule.formats():
            try:
                wire_codec(name)
            except ValueError as error:
                raise ValueError(f"wire: {error}") from None
        resolved = isinstance(self.state, tuple) and all(isinstance(pair, tuple) for pair in self.state)
        put(self, "spec", dict(self.state) if resolved else self.state)
        put(self, "state", resolve_state(self.spec, self.slots(), type(self.rule).__name__))

    @property
    def write(self) -> Nearest:
        return WRITES[self.rounding]

    def stage(self, stage: str) -> tuple[Addon, ...]:
        return tuple(addon for addon in self.addons if addon.stage == stage)

    def slots(self) -> tuple[Slot, ...]:
        """Slots of the rule, then of the add-ons: those for which `state` chooses a codec."""
        return self.rule.slots() + tuple(slot for addon in self.addons for slot in addon.slots())

    def codecs(self, view: tuple[int, ...], dtype: torch.dtype) -> dict[str, Codec]:
        """The codec of every slot of a parameter of this GLOBAL view and dtype: fp32 where the format does not fit."""
        chosen = dict(self.state)
        chosen.update((slot.name, KAHAN_CODEC) for slot in self.write.slots(dtype))
        return {name: c if c.fits(view) else codec("fp32") for name, c in chosen.items()}

    def noisy(self, view: tuple[int, ...], dtype: torch.dtype) -> bool:
        """Whether a step of such a parameter draws noise; then its state holds a key."""
        return self.write.noisy(dtype) or any(c.noisy for c in self.codecs(view, dtype).values())

    def defaults(self) -> dict[str, Any]:
        """Numbers for the param group that uses this recipe."""
        numbers: dict[str, Any] = {}
        for addon in self.addons:
            numbers.update(addon.defaults())
        return {**numbers, **self.rule.defaults()}

    def key(self) -> str:
        """The what, without numbers, devices and dtypes: `adamw/sqrt8,log8/decay/stochastic`."""
        codecs = ",".join(c.describe() for _, c in self.state) or "-"
        addons = ",".join(addon.key() for addon in self.addons) or "-"
        stored = "/stored" if self.update_from == "stored" else ""
        return f"{self.rule.key()}/{codecs}/{addons}/{self.rounding}{stored}"

    def describe(self) -> dict[str, Any]:
        """The recipe as JSON-ready data, for checkpoints and for people."""
        return {
            "key": self.key(),
            "rule": self.rule.key(),
            "state": {name: c.describe() for name, c in self.state},
            "addons": [addon.describe() for addon in self.addons],
            "rounding": self.rounding,
            "update_from": self.update_from,
        }


def addons_of(specs: Any) -> tuple[Addon, ...]:
    """Add-ons in their declared order, from objects, names (with options or without), or one string of them."""
    if isinstance(specs, str):
        specs = split_outside(specs)
    return tuple(sorted((addon_of(spec) for spec in specs), key=lambda addon: (addon.order, addon.name)))


def addon_of(spec: Any) -> Addon:
    if isinstance(spec, Addon):
        return spec
    try:
        name, options = spelled(spec)
    except (ValueError, AttributeError):
        name, options = spec, {}
    if not isinstance(name, str) or name not in ADDONS:
        raise ValueError(
            f"add-on {name!r} is unknown; give an object or one of {', '.join(ADDONS)}, with options as in "
            f"'clip_by_global_norm(max_norm=0.5)'{near(name, ADDONS)}"
        )
    known = [field.name for field in fields(ADDONS[name])]
    if unknown := [option for option in options if option not in known]:
        its = f"it has {', '.join(known) or 'none'}{near(unknown[0], known)}"
        raise ValueError(f"add-on {name} has no option {', '.join(unknown)}; {its}")
    return ADDONS[name](**options)


def check_addons(rule: Rule, addons: tuple[Addon, ...]) -> None:
    names = [addon.name for addon in addons]
    if len(set(names)) < len(names):
        raise ValueError(f"add-ons are {', '.join(names)}; each may appear once")
    for addon in addons:
        if clash := [name for name in names if name in addon.excludes]:
            raise ValueError(f"add-on {addon.name} excludes {', '.join(clash)}; drop one of them")
    if rule.sign_like and "rms_clip" in names:
        raise ValueError(f"rms_clip does nothing with {rule.name}, whose update has RMS 1; drop it")
    if rule.sign_like and "grams" in names:
        raise ValueError(f"grams makes {rule.name} the sign of the gradient; drop it or use another rule")
    if "mars" in names and not beta_of(rule):
        raise ValueError(f"mars weighs gradients by the rule's momentum, but {rule.name} has none; drop it")
    if getattr(rule, "atan2", False) and "rms_clip" in names:
        raise ValueError("atan2 already bounds the update: rms_clip excludes it; drop one of them")
