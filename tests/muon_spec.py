"""Muon, NorMuon and AdaMuon once more: in float64, on whole matrices, from the papers, shared with nothing."""

import math
from typing import Any

import torch
from torch import Tensor

QUINTIC = (3.4445, -4.7750, 2.0315)


def polar(x: Tensor, steps: int = 5) -> Tensor:
    """Newton-Schulz with Keller Jordan's coefficients, of every matrix of a stack."""
    a, b, c = QUINTIC
    tall = x.shape[-2] > x.shape[-1]
    y = x.mT if tall else x
    y = y / (y.flatten(-2).norm(dim=-1)[..., None, None] + 1e-300)
    for _ in range(steps):
        s = y @ y.mT
        y = a * y + (b * s + c * s @ s) @ y
    return y.mT if tall else y


def split(x: Tensor, rows: Any) -> list[Tensor]:
    sizes = [x.shape[-2]] if rows is None else [rows] * (x.shape[-2] // rows) if isinstance(rows, int) else list(rows)
    return list(x.split(sizes, dim=-2))


def adjusted(o: Tensor, how: str) -> Tensor:
    rows, cols = o.shape[-2:]
    factors = {
        "original": math.sqrt(max(1, rows / cols)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, cols)),
        "spectral": math.sqrt(rows / cols),
        "none": 1.0,
        "rms_rescale": 0.2 * math.sqrt(rows * cols) / o.flatten(-2).norm(dim=-1).clamp(min=1e-8)[..., None, None],
    }
    return o * factors[how]


def step(o: Any, p: Tensor, g: Tensor, s: dict, weight_decay: float) -> Tensor:
    """p after a step with gradient g. o: the rule's options."""
    mu = o.momentum
    m = s["m"] = mu * s.get("m", 0.0) + (g if o.accumulate == "sum" else (1 - mu) * g)
    x = (g + mu * m if o.accumulate == "sum" else mu * m + (1 - mu) * g) if o.nesterov else m
    if o.name == "adamuon" and o.sign:
        x = x.sign()
    parts = [polar(block) for block in split(x, o.split)]
    if o.name == "muon":
        return p - o.lr * torch.cat([adjusted(part, o.adjust_lr) for part in parts], -2) - o.lr * weight_decay * p
    b, found = o.beta2, []
    for i, part in enumerate(parts):  # each as a parameter of its own
        square = part.square().mean(-1) if o.name == "normuon" else part.square()
        v = s[i] = b * s.get(i, 0.0) + (1 - b) * square
        if o.name == "normuon":
            w = part / (v.sqrt() + o.eps)[..., None]
            w = w * (part.flatten(-2).norm(dim=-1) / w.flatten(-2).norm(dim=-1))[..., None, None]
            found.append(adjusted(w, o.adjust_lr))
        else:
            u = torch.atan2(part, v.sqrt()) if o.atan2 else part / (v.sqrt() + o.eps)
            found.append(u if o.scale == "clip" else 0.2 * u / u.square().mean((-2, -1), keepdim=True).sqrt())
    u = torch.cat(found, -2)
    if o.name == "adamuon" and o.scale == "clip":
        u = 0.2 * u / u.square().mean().sqrt().clamp(min=1.0)
    return p - o.lr * u - o.lr * weight_decay * p
