"""Inputs of layers as least-squares binary codes (Pouransari et al., arXiv 2001.02786, section 5).

A quantizer sits on a layer and replaces its input x, in the forward pass, by `μ + σ Σ v_i s_i`: the same arithmetic in
training, evaluation and after reloading. Codes are not kept; what a checkpoint holds are running averages, if any.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hf_r2.codecs.binary_bases import solve
from hf_r2.codecs.settings import CodecSettings

MOVING_AVERAGES = ("off", "eval_only", "train_and_eval")

_SMALLEST = 1e-12
"""Added to standard deviations, so that a constant input has one."""


@dataclass(frozen=True)
class ActivationSettings:
    """How the inputs of layers are quantized: `R2QuantizationConfig.activations`.

    Args:
        bits: bits of a code, 1–8.
        basis: `"optimal"` (1 and 2 bits, the default there), `"greedy"` (any, the default beyond) or `"ternary"` (2
            bits, levels −2v, 0, 2v), see [`CodecSettings`].
        centred: subtract each group's mean before, and add it after. Without it, as in the paper, levels lie
            symmetrically around zero: right for the outputs of a normalization, but of what comes from a ReLU one bit
            would keep nothing.
        clip: inputs beyond this many standard deviations of their group count as that far away, and pass no gradient.
            The paper's 2 for one bit and 3 for two, which it applies to normalized inputs, are the default: 2 at one
            bit, else 3.
        moving_average: `"off"` solves for the scales of every group at any time; `"eval_only"` evaluates with running
            averages over training, or over calibration data; `"train_and_eval"` trains with them, too.
        momentum: share of the running average that stays at every batch.
        skip: patterns of the weights whose layers keep their inputs.

    Raises:
        ValueError: for a value out of its range.
    """

    bits: int = 2
    basis: str | None = None
    centred: bool = True
    clip: float | None = None
    moving_average: str = "off"
    momentum: float = 0.99
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.basis is None:
            object.__setattr__(self, "basis", "optimal" if self.bits in (1, 2) else "greedy")
        CodecSettings("least_squares", self.bits, "tensor", basis=self.basis)
        if self.basis == "optimal" and self.bits > 2:
            raise ValueError(f"activations of {self.bits} bits need basis='greedy': optimal ones have 1 or 2 bits")
        if not isinstance(self.centred, bool):
            raise ValueError(f"centred={self.centred!r} is not true or false")
        if self.clip is None:
            object.__setattr__(self, "clip", 2.0 if self.bits == 1 else 3.0)
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} is not above 0")
        if self.moving_average not in MOVING_AVERAGES:
            raise ValueError(f"unknown moving_average {self.moving_average!r}: use one of {', '.join(MOVING_AVERAGES)}")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} is not in [0, 1)")
        if isinstance(self.skip, str):
            raise ValueError(f"skip is a list of patterns; write [{self.skip!r}]")
        object.__setattr__(self, "skip", tuple(self.skip))

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the names of the settings."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, and the bits, as JSON holds them."""
        defaults = ActivationSettings(self.bits)
        content = {key: value for key, value in asdict(self).items() if value != getattr(defaults, key)}
        if self.skip:
            content["skip"] = list(self.skip)
        return {"bits": self.bits, **content}


class InputQuantizer(nn.Module):
    """Quantizes the input of a layer; see [`ActivationSettings`].

    Groups, each with scales of its own, are examples for convolutions; for linear layers they are the vectors of
    features, so that no token of a sequence depends on another. Scales, mean and standard deviation are constants to
    the gradient, which passes each sign where its argument is within one standard deviation (see [`binary`]).

    Attributes:
        active: whether inputs are quantized yet.
        observing: whether batches count for the running averages in evaluation, too.

    Args:
        settings: how.
        by_token: whether groups are vectors of the last dimension, or examples.
    """

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__()
        self.settings = settings
        self.by_token = by_token
        self.active = self.observing = False
        if settings.moving_average != "off":
            self.register_buffer("scales", torch.zeros(settings.bits))
            self.register_buffer("mean", torch.zeros(()))
            self.register_buffer("deviation", torch.ones(()))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs of the same shape and dtype, quantized in float32.

        Raises:
            ValueError: if there is no running average yet to evaluate with.
        """
        if not self.active or inputs.numel() == 0:
            return inputs
        groups = inputs.reshape(-1, inputs.shape[-1]) if self.by_token else inputs.flatten(1)
        groups = groups.float()
        moving, learning = self.settings.moving_average, self.training or self.observing
        if moving != "off" and learning:
            self._observe(groups)
        if moving == "train_and_eval" or (moving == "eval_only" and not learning):
            quantized = binary(groups, self.mean, self.deviation, self._averaged(inputs)[None], self.settings.clip)
        else:
            quantized = binary(groups, *measured(groups, self.settings), self.settings.clip)
        return quantized.view(inputs.shape).to(inputs.dtype)

    def restart(self) -> None:
        """Observe from here on, in evaluation too, and let all batches count alike."""
        self.batches.zero_()
        self.observing = True

    @torch.no_grad()
    def _observe(self, groups: Tensor) -> None:
        """Take the batch's mean statistics into the running averages."""
        self.batches += 1
        # The first batches count alike, as no average is worth keeping before them
        share = (1 / self.batches).clamp_min(0.0 if self.observing else 1 - self.settings.momentum)
        found = (statistic.mean(dim=0) for statistic in measured(groups, self.settings))
        for average, new in zip((self.mean, self.deviation, self.scales), found, strict=True):
            average.lerp_(new.view_as(average), share)

    def _averaged(self, inputs: Tensor) -> Tensor:
        if inputs.is_cpu and self.batches == 0:
            raise ValueError(
                f"moving_average={self.settings.moving_average!r} has seen no data: train with it, or compress with a "
                "calibration_dataset"
            )
        return self.scales

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.settings.to_dict()}"


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


def quantize_inputs(layers: Mapping[str, nn.Module], settings: ActivationSettings) -> None:
    """Put a quantizer on each layer, inactive at first.

    Args:
        layers: Linear, Conv1d/2d/3d or transformers' Conv1D, by the names of their weights.
        settings: how.

    Raises:
        ValueError: for another kind of layer, such as an embedding, whose inputs are indices.
    """
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D):
            raise ValueError(
                f"the inputs of {name} ({type(layer).__name__}) cannot be quantized: put it into activations.skip"
            )
    for layer in layers.values():
        quantizer = InputQuantizer(settings, by_token=isinstance(layer, nn.Linear | Conv1D)).to(layer.weight.device)
        layer.input_quantizer = quantizer.train(layer.training)
        quantizer.handle = layer.register_forward_pre_hook(_quantize_input)


def input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    """List the quantizers in a model."""
    return [module for module in model.modules() if isinstance(module, InputQuantizer)]


def activate_inputs(model: nn.Module) -> None:
    """Let the quantizers of a model act."""
    for quantizer in input_quantizers(model):
        quantizer.active = True


def release_inputs(model: nn.Module) -> None:
    """Take all quantizers off."""
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "input_quantizer", None), InputQuantizer):
            layer.input_quantizer.handle.remove()
            del layer.input_quantizer


@torch.no_grad()
def observe_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Take running averages over calibration data, all batches alike.

    Args:
        model: with active quantizers; left in evaluation mode.
        batches: keyword arguments of the model, one mapping per batch; no labels are needed.

    Raises:
        ValueError: if there are no batches.
    """
    device = next(model.parameters()).device
    quantizers = input_quantizers(model.eval())
    for quantizer in quantizers:
        quantizer.restart()
    for batch in tqdm(batches, desc="Averaging activations", unit="batch"):
        model(**{key: value.to(device) for key, value in batch.items()})
    for quantizer in quantizers:
        quantizer.observing = False
    if not any(quantizer.batches for quantizer in quantizers):
        raise ValueError("the averages of activations need calibration data; give some, or set moving_average='off'")


def _quantize_input(layer: nn.Module, inputs: tuple) -> tuple:
    return (layer.input_quantizer(inputs[0]), *inputs[1:])
