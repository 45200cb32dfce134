"""How far a compressed weight is from its original."""

import torch
from torch import Tensor


def mse(weight: Tensor, decoded: Tensor) -> float:
    """Mean squared error, in squared units of the weight; summed in float64."""
    return float((weight.double() - decoded.double()).square().mean())


def sqnr(weight: Tensor, decoded: Tensor) -> float:
    """Signal-to-quantization-noise ratio `10 log₁₀(Σ W² / Σ (W − Ŵ)²)` in dB; infinite for an exact copy."""
    noise = (weight.double() - decoded.double()).square().sum()
    if noise == 0:
        return float("inf")
    return float(10 * torch.log10(weight.double().square().sum() / noise))
