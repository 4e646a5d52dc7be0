"""Arithmetic that rounds the same everywhere, so that kernels and devices can repeat its bits."""

import torch
from torch import Tensor


def sqrt(x: Tensor) -> Tensor:
    """Correctly rounded square root, float32. torch's vectorised one on CPUs is off by an ulp for one value in five."""
    return x.to(torch.float64).sqrt_().to(torch.float32) if x.device.type == "cpu" else x.sqrt()
