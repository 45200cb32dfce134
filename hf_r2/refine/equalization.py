"""Cross-layer equalization: neighbouring layers share their ranges (Nagel et al., arXiv 1906.04721, section 4.1).

ReLU(s x) = s ReLU(x) for s > 0, so an output channel may be divided by s and the inputs that take it multiplied by it.
A pair's ranges r₁, r₂ of a channel become equal, √(r₁ r₂) both, for s = √(r₁ / r₂); with a depthwise convolution
between, all three become c = (r₁ r₂ r₃)^⅓ for s₁₂ = r₁ / c and s₂₃ = c / r₃.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_r2.refine.chains import require_chains
from hf_r2.refine.folding import fold_batch_norms, scale_outputs, set_unit_slope

_ROUNDS, _SETTLED = 200, 1e-3  # rounds over a chain at most; change of a scale that is not worth another one


@torch.no_grad()
def equalize(model: PreTrainedModel) -> None:
    """Fold batch norms, and scale the channels of neighbouring layers to equal ranges.

    The model computes what it did, up to rounding, with ReLU in the place of ReLU6: see [`replace_relu6`].

    Args:
        model: transformers' ResNet, MobileNetV1 or MobileNetV2, under any head; changed in place.

    Raises:
        ValueError: for another architecture or activation.
    """
    found = require_chains(model, "equalize")
    fold_batch_norms(model)
    for chain in found:
        for _ in range(_ROUNDS):
            changes = [_equalize_segment(segment) for segment in segments(chain)]
            if max(changes) < _SETTLED:
                break


def segments(chain: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """Cut a chain into triplets around depthwise convolutions and pairs elsewhere, which overlap in one unit."""
    start = 0
    while start < len(chain) - 1:
        length = 3 if start + 2 < len(chain) and is_depthwise(chain[start + 1].convolution) else 2
        yield chain[start : start + length]
        start += length - 1


def is_depthwise(convolution: nn.Conv2d) -> bool:
    """Tell whether every output channel has an input channel of its own."""
    return convolution.groups == convolution.in_channels == convolution.out_channels


def pair_scale(first: Tensor, second: Tensor) -> Tensor:
    """Return s = √(r₁ / r₂) for ranges `(channels,)`; 1 where one is 0."""
    usable = (first > 0) & (second > 0)
    return torch.where(usable, (first / second).sqrt(), torch.ones_like(first))


def triplet_scales(first: Tensor, middle: Tensor, last: Tensor) -> tuple[Tensor, Tensor]:
    """Return s₁₂ = r₁ / c and s₂₃ = c / r₃, where c = (r₁ r₂ r₃)^⅓, for ranges `(channels,)`; 1 where one is 0."""
    usable = (first > 0) & (middle > 0) & (last > 0)
    # Roots before the product, which could leave the range of float32
    common = first.pow(1 / 3) * middle.pow(1 / 3) * last.pow(1 / 3)
    one = torch.ones_like(first)
    return torch.where(usable, first / common, one), torch.where(usable, common / last, one)


def output_ranges(weight: Tensor) -> Tensor:
    """Return max|W| of every output channel of `(out, in, …)`: `(out,)`."""
    return weight.abs().flatten(1).amax(dim=1)


def input_ranges(weight: Tensor, groups: int) -> Tensor:
    """Return max|W| of every input channel of a convolution's `(out, in / groups, …)`: `(in,)`."""
    return weight.abs().view(groups, weight.shape[0] // groups, weight.shape[1], -1).amax(dim=(1, 3)).flatten()


@torch.no_grad()
def scale_inputs(convolution: nn.Conv2d, factors: Tensor) -> None:
    """Multiply the input channels `(in,)` of a convolution."""
    weight = convolution.weight
    grouped = weight.view(convolution.groups, -1, *weight.shape[1:])
    grouped.mul_(factors.view(convolution.groups, 1, -1, 1, 1))


def _equalize_segment(segment: list[nn.Module]) -> float:
    """Scale a pair or a triplet, and return by how much at most: |s − 1|."""
    first, last = segment[0], segment[-1]
    outer = (
        output_ranges(first.convolution.weight),
        input_ranges(last.convolution.weight, last.convolution.groups),
    )
    if len(segment) == 2:
        scales = [pair_scale(*outer)]
    else:
        scales = list(triplet_scales(outer[0], output_ranges(segment[1].convolution.weight), outer[1]))
    for unit, following, scale in zip(segment[:-1], segment[1:], scales, strict=True):
        _divide_outputs(unit, scale)
        scale_inputs(following.convolution, scale)
    return max((scale - 1).abs().max().item() for scale in scales)


def _divide_outputs(unit: nn.Module, scale: Tensor) -> None:
    norm = unit.normalization
    scale_outputs(unit.convolution, 1 / scale)
    set_unit_slope(norm, norm.running_mean / scale, norm.weight / scale, norm.bias / scale)
