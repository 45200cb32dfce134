"""Kurtosis regularization (KURE)."""

import torch
from torch import Tensor

from hf_r2.grain import Grain, blocks

UNIFORM_KURTOSIS = 1.8
"""Kurtosis of the uniform distribution (a normal one has 3, a Laplace one 6)."""


def kurtosis(weight: Tensor, target: float = UNIFORM_KURTOSIS, grain: Grain = "tensor") -> Tensor:
    """Squared distance of the kurtosis from a target: `Σ_groups ( mean((W − μ)⁴) / mean((W − μ)²)² − target )²`.

    A group whose elements are all equal has no kurtosis and adds nothing. Source: Shkolnik et al., arXiv 2002.07686,
    who average over the layers where this sums, and divide by the unbiased deviation where this takes the moments.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        target: kurtosis to hold; 1.8 is the uniform distribution's.
        grain: the groups whose distribution is shaped.

    Returns:
        Dimensionless scalar.
    """
    terms = []
    for block in blocks(weight, grain):
        centred = block - block.mean(dim=1, keepdim=True)
        spread = block.detach().amax(dim=1) > block.detach().amin(dim=1)
        # The kurtosis does not depend on scale, so divide by the largest magnitude: fourth powers of small weights
        # would leave float32 otherwise.
        largest = torch.where(spread, centred.detach().abs().amax(dim=1), 1)
        square = (centred / largest[:, None]).square()
        second = torch.where(spread, square.mean(dim=1), 1)
        value = square.square().mean(dim=1) / second.square()
        terms.append(torch.where(spread, (value - target).square(), 0).sum())
    return torch.stack(terms).sum()
