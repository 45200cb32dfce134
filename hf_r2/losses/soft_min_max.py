"""The soft-min-max range loss."""

import torch
from torch import Tensor

from hf_r2.grain import Grain, blocks


def soft_min_max(weight: Tensor, temperature: Tensor | float, grain: Grain = "tensor") -> Tensor:
    """Smooth range of a weight: `Σ_groups rms · [ s_max − s_min + e^{−a} ]`.

    With `U = W / rms(W)` (rms of the group, detached), `s_max = Σ_i U_i p_i` where `p = softmax(a U)`, and
    `s_min = Σ_i U_i q_i` where `q = softmax(−a U)`. `e^{−a}` pushes a learnable temperature up, towards the hard range.
    Because a works on U, one temperature fits every weight: 5 sees about 90 % of the range of weights with a normal
    distribution, whether they are of size 0.02 or 1; on W itself a fixed temperature sees 3 % at 0.02.
    Source: soft-min-max R2 of Kundu et al., arXiv 2303.08253, in this project's working definition; the division by
    the rms is this project's.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        temperature: a, dimensionless: a number, or one value per group, shape `(groups,)`.
        grain: the groups whose range is restricted.

    Returns:
        Scalar in units of the weight.
    """
    parts = blocks(weight, grain)
    groups = sum(len(part) for part in parts)
    a = torch.as_tensor(temperature, dtype=parts[0].dtype, device=weight.device).expand(groups)
    terms = []
    for block, a_block in zip(parts, a.split([len(part) for part in parts]), strict=True):
        # Squares of weights beyond 1e19 or below 1e-19 would leave float32, so divide by the largest magnitude first
        largest = block.detach().abs().amax(dim=1).clamp_min(torch.finfo(block.dtype).tiny)
        rms = largest * (block.detach() / largest[:, None]).square().mean(dim=1).sqrt()
        u = block / rms.clamp_min(torch.finfo(block.dtype).tiny)[:, None]
        # softmax subtracts the largest exponent itself, so neither sum can overflow
        s_max = (u * torch.softmax(a_block[:, None] * u, dim=1)).sum(dim=1)
        s_min = (u * torch.softmax(-a_block[:, None] * u, dim=1)).sum(dim=1)
        terms.append((rms * (s_max - s_min + torch.exp(-a_block))).sum())
    return torch.stack(terms).sum()
