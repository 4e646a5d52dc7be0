"""The rules and add-ons once more: in float64, on whole tensors, transcribed from the papers and shared with nothing.

Every function is called with numbers of its own; none imports from `shardopt`. `view` is the matrix view of
contracts.md section 2, in which factors, rows and centralization live.
"""

import math
from typing import Any

import torch
from torch import Tensor

from tests.virtual import view_of


def adamw(g: Tensor, s: dict, t: int, o: Any) -> tuple[Tensor, float]:
    b1, b2 = o.betas
    s["m"] = b1 * s.get("m", 0.0) + (1 - b1) * g
    s["v"] = b2 * s.get("v", 0.0) + (1 - b2) * g**2
    bc1, bc2 = (1 - b1**t, 1 - b2**t) if o.bias_correction else (1.0, 1.0)
    m = b1 * s["m"] + (1 - b1) * g if o.nesterov else s["m"]
    den = (s["v"] / bc2).sqrt()
    return (4 / math.pi * torch.atan2(m, den) if o.atan2 else m / (den + o.eps)), o.lr / bc1


def lion(g: Tensor, s: dict, t: int, o: Any) -> tuple[Tensor, float]:
    old = s.get("m", torch.zeros_like(g))
    s["m"] = o.betas[1] * old + (1 - o.betas[1]) * g
    return torch.sign(o.betas[0] * old + (1 - o.betas[0]) * g), o.lr


def sgd(g: Tensor, s: dict, t: int, o: Any) -> tuple[Tensor, float]:
    if not o.momentum:
        return g, o.lr
    s["m"] = o.momentum * s["m"] + (1 - o.dampening) * g if t > 1 else g
    return (g + o.momentum * s["m"] if o.nesterov else s["m"]), o.lr


def rmsprop(g: Tensor, s: dict, t: int, o: Any) -> tuple[Tensor, float]:
    s["v"] = o.alpha * s.get("v", 0.0) + (1 - o.alpha) * g**2
    s["a"] = o.alpha * s.get("a", 0.0) + (1 - o.alpha) * g
    v = s["v"] / (1 - o.alpha**t) if o.bias_correction else s["v"]
    u = g / ((v - s["a"] ** 2 if o.centered else v).sqrt() + o.eps)
    if o.momentum:
        u = s["b"] = o.momentum * s.get("b", 0.0) + u
    return u, o.lr


def adafactor(p: Tensor, g: Tensor, s: dict, t: int, o: Any) -> tuple[Tensor, float, float]:
    eps1 = o.eps[0] if o.eps[0] is not None else (1e-30 if o.eps_mode == "add" else 2.0**-23)
    rho = min(o.lr, t**-0.5) if o.relative_step else o.lr
    alpha = rho * max(o.eps[1], rms(p)) if o.scale_parameter else rho
    w = t**o.beta2_decay if o.beta2 is None else 1 - o.beta2
    square = g**2 + (eps1 if o.eps_mode == "add" else 0.0)
    if g.ndim >= 2:
        s["row"] = (1 - w) * s.get("row", 0.0) + w * square.mean(-1)
        s["col"] = (1 - w) * s.get("col", 0.0) + w * square.mean(-2)
        mean = s["row"].mean(-1, keepdim=True).clamp(min=eps1)
        v = (s["row"] / mean)[..., :, None] * s["col"][..., None, :]
    else:
        v = s["v"] = (1 - w) * s.get("v", 0.0) + w * square
    q = v.clamp(min=eps1**2) ** -0.5
    u = g * q
    if o.beta1 and o.momentum == "raw":
        s["m"] = o.beta1 * s.get("m", 0.0) + (1 - o.beta1) * g
        u = s["m"] * q
    if o.d:
        u = u / max(1.0, rms(u) / o.d)
    if o.beta1 and o.momentum == "update":
        u = s["m"] = o.beta1 * s.get("m", 0.0) + (1 - o.beta1) * u
    step = alpha
    if o.bias_correction:
        step = step * math.sqrt(1 - o.beta2**t) / (1 - o.beta1**t if o.beta1 else 1.0)
    return u, step, {"torch": o.lr, "scaled": alpha, "decoupled": rho}[o.decay]


RULES = {"adamw": adamw, "lion": lion, "sgd": sgd, "rmsprop": rmsprop}


def rms(x: Tensor) -> float:
    return float(x.square().mean().sqrt())


def step(options: Any, addons: tuple[str, ...], weight_decay: float, ps: list, gs: list, states: list, t: int) -> list:
    """The parameters after step t. options: a rule's numbers; addons: names; states: one dict a parameter."""
    clip = min(1.0, 1.0 / (math.sqrt(sum(float(g.square().sum()) for g in gs)) + 1e-6))
    after = []
    for p, g, s in zip(ps, gs, states):
        shape = p.shape
        p, g = p.reshape(view_of(tuple(shape))), g.reshape(view_of(tuple(shape)))
        if "clip_by_global_norm" in addons:
            g = g * clip
        if "l2" in addons:
            g = g + weight_decay * p
        if "gradient_centralization" in addons and g.ndim > 1:
            g = g - g.mean(-1, keepdim=True)
        if "orthograd" in addons:
            rest = g - (p * g).sum() / ((p * p).sum() + 1e-30) * p
            g = rest * (g.norm() / rest.norm()) if rest.norm() > 1e-6 * g.norm() else 0.0 * g
        if "mars" in addons:
            beta = (
                options.betas[0] if hasattr(options, "betas") else getattr(options, "beta1", None) or options.momentum
            )
            c = g + 0.025 * beta / (1 - beta) * (g - s.get("last", g))
            s["last"] = g
            g = c / max(1.0, float(c.norm()))
        if options.name == "adafactor":
            u, rate, decay_rate = adafactor(p, g, s, t, options)
        else:
            u, rate = RULES[options.name](g, s, t, options)
            decay_rate = options.lr
        if "grams" in addons:
            u = u.abs() * g.sign()
        if "rms_clip" in addons:
            u = u / max(1.0, rms(u))
        if "cautious" in addons:
            mask = (u * g > 0).double()
            u = u * mask / max(float(mask.sum() / max(1, int((g != 0).sum()))), 1e-3)
        decayed = p if "decay" in addons else torch.where(u * p >= 0, p, 0.0) if "cautious_decay" in addons else 0.0
        after.append((p - rate * u - decay_rate * weight_decay * decayed).reshape(shape))
    return after
