"""Kurtosis regularization (KURE)."""

from functools import partial

import torch
from torch import Tensor

from hf_r2.grain import Grain, pieces
from hf_r2.losses.term import Measure, Measured, range_term
from hf_r2.moments import extremes
from hf_r2.sharding import LocalWeight, Routine

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
    return range_term(kurtosis_measure(target), grain, [weight])


def kurtosis_measure(target: float = UNIFORM_KURTOSIS) -> Measure:
    """Return the routine of a target; see [`kurtosis`]."""
    return partial(_measure, target)


def _measure(target: float, weight: LocalWeight) -> Routine[Measured]:
    bounds = yield from extremes(weight)
    # The kurtosis does not depend on scale, so the range becomes 1: fourth powers of small weights would leave float32
    spread = [bound[:, 0] != bound[:, 1] for bound in bounds]  # true for NaN, too
    units = [torch.where(s, 1 / (bound[:, 0] - bound[:, 1]), 0) for s, bound in zip(spread, bounds, strict=True)]
    starts = [bound[:, 1] for bound in bounds]
    (means,) = yield from _moments(weight, units, starts, [1])
    means = [
        start + mean.to(start) / unit.where(unit > 0, 1) for start, mean, unit in zip(starts, means, units, strict=True)
    ]
    seconds, thirds, fourths = yield from _moments(weight, units, means, [2, 3, 4])
    values, slopes = [], []
    for varied, second, third, fourth in zip(spread, seconds, thirds, fourths, strict=True):
        second = torch.where(varied, second, 1)
        ratio = fourth / second.square()
        values.append(torch.where(varied, (ratio - target).square(), 0))
        slopes.append((torch.where(varied, 2 * (ratio - target) / second.square(), 0), third, ratio * second))
    value = yield from weight.over_groups([v.to(unit.dtype) for v, unit in zip(values, units, strict=True)])

    def add_gradient(grads: list[Tensor], scale: Tensor | float) -> None:
        # dκ/dx_i = 4 / (n·m2²) · (x_i³ − m3 − κ·m2·x_i), with x = unit · (W − μ)
        for index, (block, grad) in enumerate(zip(weight.blocks(), grads, strict=True)):
            slope, third, linear = slopes[index]
            outer = (4 / weight.elements[index] * slope * units[index] * scale).to(block.dtype)[:, None]
            third, linear = third.to(block.dtype)[:, None], linear.to(block.dtype)[:, None]
            for band, (piece, target_piece) in pieces(block, grad):
                x = (piece - means[index][band, None]) * units[index][band, None]
                target_piece.add_(outer[band] * (x * (x.square() - linear[band]) - third[band]))

    return Measured(value, add_gradient)


def _moments(
    weight: LocalWeight, units: list[Tensor], centres: list[Tensor], powers: list[int]
) -> Routine[list[list[Tensor]]]:
    """Mean of `(unit · (W − centre))^power` for each group, float64: by power, then by block."""
    sums = []
    for block, unit, centre in zip(weight.blocks(), units, centres, strict=True):
        sums.append(torch.zeros(len(unit), len(powers), dtype=torch.float64, device=block.device))
        for band, (piece,) in pieces(block):
            x = (piece - centre[band, None]) * unit[band, None]
            terms, term = {}, x
            for power in range(1, max(powers) + 1):
                terms[power] = term.sum(dim=1)
                term = term * x
            sums[-1][band] += torch.stack([terms[power] for power in powers], dim=1)
    sums = yield from weight.total(sums)
    means = [part / elements for part, elements in zip(sums, weight.elements, strict=True)]
    return [[mean[:, index] for mean in means] for index in range(len(powers))]
