"""The L-infinity range loss."""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_r2.grain import Grain
from hf_r2.largest import search_largest
from hf_r2.losses.term import AddGradient, Measured, range_term
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.stacking import Stacker


def l_inf(weight: Tensor, grain: Grain = "tensor") -> Tensor:
    """Sum of the largest magnitudes: `Σ_groups max|W|`.

    The subgradient is `sign(W)` on the largest element of each group (shared between ties) and zero elsewhere, whatever
    the size of the weight. Source: L_inf R2 of Kundu et al., arXiv 2303.08253, in this project's working definition.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        grain: the groups whose range is restricted.

    Returns:
        Scalar in units of the weight.
    """
    return range_term(measure_l_inf, Stacker(grain), [weight])


def measure_l_inf(weight: LocalWeight) -> Routine[Measured]:
    """Measure L-infinity; see [`l_inf`]."""
    tops, _, add_gradient = yield from find_largest(weight)
    value = yield from weight.over_groups(tops)
    return Measured(value, add_gradient)


def find_largest(weight: LocalWeight, level: Tensor | None = None) -> Routine[tuple[Tensor, Tensor, AddGradient]]:
    """Find the largest magnitude of each group and the elements that have it.

    Args:
        weight: the weight.
        level: `(groups,)`; where the largest magnitude is not above it, there is no gradient.

    Returns:
        The largest magnitudes; 1 for each group that has a gradient, 0 for others; and a function that adds scale ×
        `sign(W)` on the largest elements of these, shared between ties, to blocks in place.
    """
    search = search_largest(weight.blocks(), weight.tiles)
    yield
    tops = yield from weight.maximum(search.tops())
    counted = torch.ones_like(tops) if level is None else (tops > level).to(tops.dtype)
    found = search.find(tops.where(counted > 0, torch.inf))
    counts = yield from weight.total(found.counts())

    def add_gradient(grads: Sequence[Tensor], scale: Tensor | float) -> None:
        found.add(grads, weight.per_group(scale).to(counts.dtype) / counts.clamp_min(1))

    return tops, counted, add_gradient
