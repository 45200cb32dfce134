"""The L-infinity range loss."""

import torch
from torch import Tensor

from hf_r2.grain import Grain, blocks


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
    return torch.stack([block.abs().amax(dim=1).sum() for block in blocks(weight, grain)]).sum()
