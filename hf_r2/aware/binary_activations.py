"""Inputs of layers as least-squares binary codes (Pouransari et al., arXiv 2001.02786, section 5).

An input x becomes `μ + σ Σ v_i s_i`; scales come from the input itself, or from running averages.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.input_quantizer import InputQuantizer
from hf_r2.codecs.binary_bases import solve

_SMALLEST = 1e-12
"""Added to standard deviations, so that a constant input has one."""


class BinaryInputs(InputQuantizer):
    """Quantizes the input of a layer to sums of signs; see [`ActivationSettings`].

    Groups, each with scales of its own, are examples for convolutions; for linear layers they are the vectors of
    features, so that no token of a sequence depends on another. Scales, mean and standard deviation are constants to
    the gradient, which passes each sign where its argument is within one standard deviation (see [`binary`]).
    """

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        if settings.moving_average != "off":
            self.register_buffer("scales", torch.zeros(settings.bits, dtype=torch.float32))
            self.register_buffer("mean", torch.zeros((), dtype=torch.float32))
            self.register_buffer("deviation", torch.ones((), dtype=torch.float32))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def quantized(self, inputs: Tensor) -> Tensor:
        """Quantize float32 inputs."""
        groups = inputs.reshape(-1, inputs.shape[-1]) if self.by_token else inputs.flatten(1)
        moving, learning = self.settings.moving_average, self.training or self.observing
        if moving != "off" and learning:
            self._observe(groups)
        if moving == "train_and_eval" or (moving == "eval_only" and not learning):
            self.require_statistics(inputs)
            quantized = binary(groups, self.mean, self.deviation, self.scales[None], self.settings.clip)
        else:
            quantized = binary(groups, *measured(groups, self.settings), self.settings.clip)
        return quantized.view(inputs.shape)

    @torch.no_grad()
    def _observe(self, groups: Tensor) -> None:
        """Take the batch's mean statistics into the running averages."""
        share = self.new_share()
        found = (statistic.mean(dim=0) for statistic in measured(groups, self.settings))
        for average, new in zip((self.mean, self.deviation, self.scales), found, strict=True):
            average.lerp_(new.view_as(average), share)


def measured(groups: Tensor, settings: ActivationSettings) -> tuple[Tensor, Tensor, Tensor]:
    """Solve for the binary basis of every group `(groups, n)`.

    Returns:
        Mean and standard deviation (around zero, if the settings do not centre), `(groups, 1)`; and scales in units of
        the deviation, `(groups, bits)`. Without gradient.
    """
    with torch.no_grad():
        mean = groups.mean(dim=1, keepdim=True) if settings.centred else groups.new_zeros(len(groups), 1)
        rest = groups - mean
        deviation = rest.square().mean(dim=1, keepdim=True).sqrt().add_(_SMALLEST)
        scales = solve(rest.div_(deviation).clamp_(-settings.clip, settings.clip), settings.bits, settings.basis)
        return mean, deviation, scales


def binary(groups: Tensor, mean: Tensor, deviation: Tensor, scales: Tensor, clip: float) -> Tensor:
    """Return `μ + σ Σ v_i s_i` with `s_i = sign(u − Σ_{j<i} v_j s_j)` and `u = (x − μ) / σ`, differentiably in x.

    A sign's derivative counts as 1 where its argument is within ±1, and as 0 elsewhere and beyond the clip, as for the
    inputs of variance 1 of the paper; the derivatives of the signs before it are followed.

    Args:
        groups: x, float32 `(groups, n)`.
        mean: μ, `(groups, 1)` or a scalar.
        deviation: σ > 0, likewise.
        scales: v, `(groups, k)` or `(1, k)`, in units of σ.
        clip: in units of σ.
    """
    return _Binary.apply(groups, mean, deviation, scales, clip)


class _Binary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, groups: Tensor, mean: Tensor, deviation: Tensor, scales: Tensor, clip: float) -> Tensor:
        rest = (groups - mean).div_(deviation)
        inside = (rest.abs() <= clip).float() if ctx.needs_input_grad[0] else None
        slope, left_slope = torch.zeros_like(rest), inside
        result = torch.zeros_like(rest)
        for scale in scales.unbind(dim=1):
            signed = torch.where(rest >= 0, scale[:, None], -scale[:, None])
            if inside is not None:
                part = (rest.abs() <= 1) * left_slope * scale[:, None]
                slope += part
                left_slope = left_slope - part
            result += signed
            rest -= signed
        if inside is not None:
            ctx.save_for_backward(slope)
        return result.mul_(deviation).add_(mean)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        (slope,) = ctx.saved_tensors
        return grad * slope, None, None, None, None
