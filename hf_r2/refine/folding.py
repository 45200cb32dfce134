"""Batch-norm folding: scales of normalizations go into the weights before them (Nagel et al., arXiv 1906.04721).

The architecture keeps its batch norms, so that a folded model saves and loads like any other: what is left of one has
slope 1, weight = √(running_var + ε), and adds bias − running_mean. Its statistics stay true: the outputs of the folded
convolution have mean running_mean and deviation weight, and those of the norm mean bias and deviation weight. High-bias
absorption, analytic bias correction and re-estimation read them there.
"""

import torch
from torch import Tensor, nn

from hf_r2.refine.chains import units


@torch.no_grad()
def fold_batch_norms(model: nn.Module) -> None:
    """Fold every batch norm right behind a convolution into it; the model computes the same, up to rounding."""
    for unit in units(model):
        fold(unit.convolution, unit.normalization)


@torch.no_grad()
def fold(convolution: nn.Conv2d, norm: nn.BatchNorm2d) -> None:
    """Scale output channels by γ / √(σ² + ε), and leave a norm of slope 1.

    Args:
        convolution: weight `(out, in / groups, height, width)`.
        norm: what normalizes its outputs, by running statistics.
    """
    slope = norm.weight / (norm.running_var + norm.eps).sqrt()
    mean, deviation = norm.running_mean * slope, norm.weight.abs()
    scale_outputs(convolution, slope)
    set_unit_slope(norm, mean, deviation, norm.bias)


@torch.no_grad()
def scale_outputs(convolution: nn.Conv2d, factors: Tensor) -> None:
    """Multiply the output channels `(out,)` of a convolution."""
    convolution.weight.mul_(factors.view(-1, 1, 1, 1))
    if convolution.bias is not None:
        convolution.bias.mul_(factors)


@torch.no_grad()
def set_unit_slope(norm: nn.BatchNorm2d, mean: Tensor, deviation: Tensor, bias: Tensor) -> None:
    """Let a norm compute x − mean + bias, channel by channel.

    Args:
        norm: changed in place.
        mean: of its inputs, `(channels,)`.
        deviation: of its inputs; less than √ε counts as that.
        bias: mean of its outputs.
    """
    norm.running_mean.copy_(mean)
    norm.running_var.copy_((deviation.square() - norm.eps).clamp_min(0))
    norm.weight.copy_((norm.running_var + norm.eps).sqrt())
    norm.bias.copy_(bias)
