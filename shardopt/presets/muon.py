"""Muon, NorMuon and AdaMuon: for matrices; `shardopt.build_optimizer` routes a whole model."""

from typing import Any

from shardopt import rules
from shardopt.addons import WeightDecay
from shardopt.polar import NewtonSchulz
from shardopt.presets.base import Preset

QUINTIC = (3.4445, -4.7750, 2.0315)
STATE = "signed=int8,non_negative=root4"  # absolute precision, which orthogonalization wants of a momentum


class Muon(Preset):
    """Muon with torch.optim.Muon's signature and defaults, of the whole matrix on any mesh. Rule: `rules.Muon`.

    adjust_lr_fn: the rule's adjust_lr; None is "original". orthogonalizer: an object or a name of shardopt.polar,
    instead of ns_coefficients, ns_steps and eps. accumulate, split, wire, mode, period: see the rule. A param group may
    have all of these under the same names.
    """

    rule: type[rules.Muon] = rules.Muon

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        weight_decay: Any = 0.1,
        momentum: Any = 0.95,
        nesterov: bool = True,
        ns_coefficients: Any = QUINTIC,
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        orthogonalizer: Any = None,
        accumulate: str = "ema",
        split: Any = None,
        wire: str = "int8",
        mode: str = "full",
        period: int = 1,
        state: Any = STATE,
        more: Any = None,
        **options: Any,
    ) -> None:
        if orthogonalizer is None:
            orthogonalizer = NewtonSchulz(coefficients=rules.muon.known_as(ns_coefficients), steps=ns_steps, eps=eps)
        elif (tuple(ns_coefficients), ns_steps) != (QUINTIC, 5):
            raise ValueError(
                f"both orthogonalizer={orthogonalizer!r} and ns_coefficients or ns_steps were given; give options to "
                "the orthogonalizer itself, as 'newton_schulz(steps=4)'"
            )
        adjust: dict[str, Any] = {} if adjust_lr_fn is None else {"adjust_lr": adjust_lr_fn}
        rule = self.rule(
            lr=lr,
            momentum=momentum,
            nesterov=nesterov,
            orthogonalizer=orthogonalizer,
            accumulate=accumulate,
            split=split,
            wire=wire,
            mode=mode,
            period=period,
            **adjust,
            **(more or {}),
        )
        super().__init__(params, rule, WeightDecay(), weight_decay, state=state, **options)


class NorMuon(Muon):
    """NorMuon (arXiv 2510.05491): Muon with a second moment of every row. Rule: `rules.NorMuon`."""

    rule = rules.NorMuon

    def __init__(self, params: Any, *args: Any, beta2: Any = 0.95, norm_eps: float = 1e-8, **options: Any) -> None:
        super().__init__(params, *args, more={"beta2": beta2, "eps": norm_eps}, **options)


class AdaMuon(Muon):
    """AdaMuon (arXiv 2507.11005): Muon with a second moment of every element. Rule: `rules.AdaMuon`."""

    rule = rules.AdaMuon

    def __init__(
        self,
        params: Any,
        *args: Any,
        beta2: Any = 0.95,
        adam_eps: float = 1e-8,
        sign: bool = True,
        atan2: bool = False,
        scale: str = "rms_rescale",
        **options: Any,
    ) -> None:
        more = {"beta2": beta2, "eps": adam_eps, "sign": sign, "atan2": atan2, "scale": scale}
        super().__init__(params, *args, more=more, **options)
