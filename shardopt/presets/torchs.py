"""The optimizers of torch.optim by their own names, signatures and defaults: changing the import is enough."""

from typing import Any

from shardopt import rules
from shardopt.addons import CoupledDecay, WeightDecay
from shardopt.groups import refuse
from shardopt.presets.base import Preset


class Adam(Preset):
    """Adam with torch.optim.Adam's signature and defaults, coupled L2 included. Rule: `rules.AdamW`."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        amsgrad: bool = False,
        *,
        decoupled_weight_decay: bool = False,
        state: Any = "int8",
        bias_correction: bool = True,
        atan2: bool = False,
        nesterov: bool = False,
        **options: Any,
    ) -> None:
        refuse({"amsgrad": amsgrad})
        rule = rules.AdamW(lr=lr, betas=betas, eps=eps, bias_correction=bias_correction, atan2=atan2, nesterov=nesterov)
        decay = WeightDecay() if decoupled_weight_decay else CoupledDecay()
        super().__init__(params, rule, decay, weight_decay, state=state, **options)


class AdamW(Adam):
    """AdamW with torch.optim.AdamW's signature and defaults. Rule: `rules.AdamW`, its switches as in Adam."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        betas: Any = (0.9, 0.999),
        eps: Any = 1e-8,
        weight_decay: Any = 1e-2,
        amsgrad: bool = False,
        *,
        state: Any = "int8",
        **options: Any,
    ) -> None:
        if not options.setdefault("decoupled_weight_decay", True):
            raise ValueError(
                "AdamW's weight decay is decoupled; Adam has the coupled one of decoupled_weight_decay=False"
            )
        super().__init__(params, lr, betas, eps, weight_decay, amsgrad, state=state, **options)


class Lion(Preset):
    """Lion with decoupled decay (arXiv 2302.06675). Rule: `rules.Lion`."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-4,
        betas: Any = (0.9, 0.99),
        weight_decay: Any = 0.0,
        *,
        state: Any = "int8",
        **options: Any,
    ) -> None:
        super().__init__(params, rules.Lion(lr=lr, betas=betas), WeightDecay(), weight_decay, state=state, **options)


class SGD(Preset):
    """SGD with torch.optim.SGD's signature and defaults, coupled L2 included. Rule: `rules.SGD`."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-3,
        momentum: Any = 0.0,
        dampening: Any = 0.0,
        weight_decay: Any = 0.0,
        nesterov: bool = False,
        *,
        state: Any = "int8",
        **options: Any,
    ) -> None:
        rule = rules.SGD(lr=lr, momentum=momentum, dampening=dampening, nesterov=nesterov)
        super().__init__(params, rule, CoupledDecay(), weight_decay, state=state, **options)


class RMSprop(Preset):
    """RMSprop with torch.optim.RMSprop's signature and defaults, coupled L2 included. Rule: `rules.RMSprop`."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        alpha: Any = 0.99,
        eps: Any = 1e-8,
        weight_decay: Any = 0.0,
        momentum: Any = 0.0,
        centered: bool = False,
        *,
        state: Any = "int8",
        bias_correction: bool = False,
        **options: Any,
    ) -> None:
        rule = rules.RMSprop(
            lr=lr, alpha=alpha, eps=eps, momentum=momentum, centered=centered, bias_correction=bias_correction
        )
        super().__init__(params, rule, CoupledDecay(), weight_decay, state=state, **options)


class Adafactor(Preset):
    """Adafactor with torch.optim.Adafactor's signature and defaults. Rule and further options: `rules.Adafactor`."""

    def __init__(
        self,
        params: Any,
        lr: Any = 1e-2,
        beta2_decay: float = -0.8,
        eps: Any = (None, 1e-3),
        d: float = 1.0,
        weight_decay: Any = 0.0,
        *,
        beta1: float | None = None,
        beta2: float | None = None,
        relative_step: bool = True,
        scale_parameter: bool = True,
        momentum: str = "update",
        bias_correction: bool = False,
        decay: str = "torch",
        eps_mode: str = "clamp",
        state: Any = "factored",
        **options: Any,
    ) -> None:
        rule = rules.Adafactor(
            lr=lr,
            beta2_decay=beta2_decay,
            eps=eps,
            d=d,
            beta1=beta1,
            beta2=beta2,
            relative_step=relative_step,
            scale_parameter=scale_parameter,
            momentum=momentum,
            bias_correction=bias_correction,
            decay=decay,
            eps_mode=eps_mode,
        )
        super().__init__(params, rule, WeightDecay(), weight_decay, state=state, **options)
