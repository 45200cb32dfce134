"""The tail-mean range loss."""

import math

import torch
from torch import Tensor

from hf_r2.grain import Grain, blocks


def tail_mean(weight: Tensor, fraction: float = 0.01, grain: Grain = "tensor") -> Tensor:
    """Mean magnitude of the largest weights: `Σ_groups mean of the ⌈fraction · n⌉ largest |W_i|`.

    The conditional value at risk of |W| (Rockafellar and Uryasev, 2000). It is what the margin loss becomes when its
    sum is divided by `fraction · n` and minimised over the margin; `fraction = 1/n` is L-infinity, `fraction = 1` is
    the mean of |W|.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        fraction: share of a group's elements in the tail, in (0, 1]; at least one element is.
        grain: the groups whose tail is restricted.

    Returns:
        Scalar in units of the weight.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    if not 0 < fraction <= 1:
        raise ValueError(f"tail fraction {fraction} is not in (0, 1]; 0.01 takes the largest 1 % of the weights")
    terms = []
    for block in blocks(weight, grain):
        # 0.07 · 100 is 7.000000000000001 in floating point: a hair above a whole number is that number
        count = max(1, math.ceil(fraction * block.shape[1] * (1 - 1e-9)))
        terms.append(block.abs().topk(count, dim=1, sorted=False).values.mean(dim=1).sum())
    return torch.stack(terms).sum()
