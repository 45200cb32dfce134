"""Kurtosis regularization (KURE)."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_r2.grain import Grain, pieces
from hf_r2.losses.term import Measure, Measured, range_term
from hf_r2.moments import extremes
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.stacking import Stacker

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
    return range_term(kurtosis_measure(target), Stacker(grain), [weight])


def kurtosis_measure(target: float = UNIFORM_KURTOSIS) -> Measure:
    """Return the routine of a target; see [`kurtosis`]."""
    return partial(_measure, target)


def _measure(target: float, weight: LocalWeight) -> Routine[Measured]:
    high, low = (yield from extremes(weight)).unbind(dim=1)
    # The kurtosis does not depend on scale, so the range becomes 1: fourth powers of small weights would leave float32
    varied = high != low  # true for NaN, too
    units = torch.where(varied, 1 / (high - low), 0)
    (means,) = yield from _moments(weight, units, low, [1])
    means = low + means.to(low) / units.where(units > 0, 1)
    second, third, fourth = yield from _moments(weight, units, means, [2, 3, 4])
    second = torch.where(varied, second, 1)
    ratio = fourth / second.square()
    value = yield from weight.over_groups(torch.where(varied, (ratio - target).square(), 0).to(units.dtype))
    slopes = torch.where(varied, 2 * (ratio - target) / second.square(), 0)

    def add_gradient(grads: Sequence[Tensor], scale: Tensor | float) -> None:
        # dκ/dx_i = 4 / (n·m2²) · (x_i³ − m3 − κ·m2·x_i), with x = unit · (W − μ)
        outer = 4 * slopes * units * scale / weight.group_elements
        terms = torch.stack([outer, third, ratio * second, means, units], dim=1).to(units.dtype)
        if weight.tiles is not None:
            weight.tiles.add_kurtosis_gradient(grads, terms)
            return
        for block, grad, of_block in zip(weight.blocks(), grads, weight.split(terms), strict=True):
            for band, (piece, target_piece) in pieces(block, grad):
                factor, cube, linear, mean, unit = of_block[band, :, None].unbind(dim=1)
                x = (piece - mean) * unit
                target_piece.add_(factor * (x * (x.square() - linear) - cube))

    return Measured(value, add_gradient)


def _moments(weight: LocalWeight, units: Tensor, centres: Tensor, powers: list[int]) -> Routine[tuple[Tensor, ...]]:
    """Mean of `(unit · (W − centre))^power` for each group, `(groups,)` in float64, by power."""
    if weight.tiles is not None:
        found = weight.tiles.moments(units, centres) / weight.group_elements
        return tuple(found[power - 1] for power in powers)
    sums = torch.zeros(len(units), len(powers), dtype=torch.float64, device=units.device)
    for block, *parts in zip(weight.blocks(), *map(weight.split, (units, centres, sums)), strict=True):
        unit, centre, total = parts
        for band, (piece,) in pieces(block):
            x = (piece - centre[band, None]) * unit[band, None]
            terms, term = {}, x
            for power in range(1, max(powers) + 1):
                terms[power] = term.sum(dim=1)
                term = term * x
            total[band] += torch.stack([terms[power] for power in powers], dim=1)
    sums = yield from weight.total(sums)
    return (sums.T / weight.group_elements).unbind()
