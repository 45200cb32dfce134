"""The margin range loss."""

import torch
from torch import Tensor

from hf_r2.grain import Grain, blocks


def margin(weight: Tensor, margin: Tensor, grain: Grain = "tensor", reduction: str = "max") -> Tensor:
    """Learnable margin plus what stands outside it: `Σ_groups [ |M| + reduce_i max(|W_i| − |M|, 0) ]`.

    With `"max"` it behaves like L-infinity down to the margin: weights get gradient only while they stand outside it,
    and M only while nothing does. With `"sum"` (the working definition of margin R2, Kundu et al., arXiv 2303.08253)
    every weight outside gets gradient, and minimised over M it again equals `max|W|`; in practice M overshoots.
    A mean over the elements would drive M to 0 and turn the loss into an L1 penalty, so it is not offered.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        margin: M, one value per group, shape `(groups,)`, in units of the weight.
        grain: the groups whose range is restricted.
        reduction: `"max"` or `"sum"` over the elements of a group.

    Returns:
        Scalar in units of the weight.

    Raises:
        ValueError: for another reduction.
    """
    if reduction not in ("max", "sum"):
        raise ValueError(f"unknown margin reduction {reduction!r}: use 'max' or 'sum'")
    parts = blocks(weight, grain)
    terms = []
    for block, level in zip(parts, margin.abs().split([len(part) for part in parts]), strict=True):
        outside = (block.abs() - level[:, None]).relu()
        outside = outside.amax(dim=1) if reduction == "max" else outside.sum(dim=1)
        terms.append((level + outside).sum())
    return torch.stack(terms).sum()
