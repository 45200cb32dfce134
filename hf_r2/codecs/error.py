"""How far a compressed weight is from its original."""

import math

import torch
from torch import Tensor

from hf_r2.grain import pieces


def energies(weight: Tensor, decoded: Tensor) -> tuple[float, float]:
    """Return Σ W² and Σ (W − Ŵ)² of a weight and the compressed one, summed in float64."""
    energies = torch.zeros(2, dtype=torch.float64, device=weight.device)
    for _, parts in pieces(*(tensor.detach().reshape(1, -1) for tensor in (weight, decoded))):
        original, rounded = (part.double() for part in parts)
        energies += torch.stack([original.square().sum(), original.sub_(rounded).square_().sum()])
    return energies[0].item(), energies[1].item()


def mse(weight: Tensor, decoded: Tensor) -> float:
    """Mean squared error, in squared units of the weight; summed in float64."""
    return energies(weight, decoded)[1] / weight.numel()


def sqnr(weight: Tensor, decoded: Tensor) -> float:
    """Signal-to-quantization-noise ratio `10 log₁₀(Σ W² / Σ (W − Ŵ)²)` in dB; infinite for an exact copy."""
    return decibels(*energies(weight, decoded))


def decibels(signal: float, noise: float) -> float:
    """Return the ratio of two sums of squares in dB: infinite without noise, minus infinite without a signal."""
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
