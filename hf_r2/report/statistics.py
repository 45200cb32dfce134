"""Statistics of a model's weights."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.codecs import CodecSettings, decode, encode, sqnr
from hf_r2.moments import shapes
from hf_r2.selection import output_first, select_weights

SQNR_BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class WeightStatistics:
    """One weight's statistics, computed in float32 or better.

    Args:
        name: parameter name.
        shape: shape of the parameter.
        min: smallest value.
        max: largest value.
        rms: root of the mean square.
        range: max − min.
        crest_factor: max|W| / rms(W); 1 for a weight of two values ±c, √3 for a uniform distribution.
        kurtosis: fourth moment over the squared second, around the mean; 1.8 uniform, 3 normal.
        sqnr: signal-to-quantization-noise ratio in dB of per-tensor symmetric min-max quantization, by bits.
    """

    name: str
    shape: tuple[int, ...]
    min: float
    max: float
    rms: float
    range: float
    crest_factor: float
    kurtosis: float
    sqnr: dict[int, float]


@torch.no_grad()
def weight_statistics(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] | None = None,
    min_numel: int = 0,
) -> list[WeightStatistics]:
    """Compute the statistics of every weight that [`select_weights`] chooses.

    Raises:
        ValueError: for an empty selection and for weights with NaN or infinite values.
    """
    selection = select_weights(model, include, exclude, min_numel)
    return [_statistics(name, module, getattr(module, attribute)) for name, (module, attribute) in selection.items()]


@torch.no_grad()
def moments(weight: Tensor) -> dict[str, float]:
    """Return min, max, rms, crest factor and kurtosis of a weight; see [`WeightStatistics`]."""
    values = weight.double()
    centred = values - values.mean()
    variance = centred.square().mean()
    return {
        "min": weight.min().item(),
        "max": weight.max().item(),
        "rms": values.square().mean().sqrt().item(),
        "crest_factor": shapes([weight])[0].crest_factor.item(),
        "kurtosis": (centred.square().square().mean() / variance.square()).item() if variance > 0 else 0.0,
    }


def _statistics(name: str, module: nn.Module, parameter: Tensor) -> WeightStatistics:
    weight = output_first(module, parameter)
    values = moments(weight)
    return WeightStatistics(
        name=name,
        shape=tuple(parameter.shape),
        range=values["max"] - values["min"],
        sqnr={
            bits: sqnr(weight, decode(encode(weight, CodecSettings("uniform", bits, "tensor"), name)))
            for bits in SQNR_BITS
        },
        **values,
    )
