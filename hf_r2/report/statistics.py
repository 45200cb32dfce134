"""Statistics of a model's weights."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from hf_r2.codecs import CodecSettings, Encoded, decode
from hf_r2.codecs.encoded import bands, require_finite
from hf_r2.codecs.error import decibels
from hf_r2.codecs.uniform import grid_of, nearest, symmetric_offset
from hf_r2.codecs.value_counts import count_values, countable
from hf_r2.grain import pieces
from hf_r2.selection import select_weights

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
    return [tensor_statistics(name, getattr(module, attribute)) for name, (module, attribute) in selection.items()]


@torch.no_grad()
def tensor_statistics(name: str, weight: Tensor, shape: Sequence[int] | None = None) -> WeightStatistics:
    """Compute the statistics of one weight, piece by piece, so that nothing of its size is built.

    Args:
        name: parameter name.
        weight: any float dtype.
        shape: shape of the parameter, if it is not the weight's.

    Raises:
        ValueError: for a weight with NaN or infinite values.
    """
    require_finite(weight, name)
    values = Values(weight)
    facts = values.moments()
    return WeightStatistics(
        name=name,
        shape=tuple(weight.shape if shape is None else shape),
        range=facts["max"] - facts["min"],
        sqnr={bits: values.sqnr(bits) for bits in SQNR_BITS},
        **facts,
    )


def moments(weight: Tensor | Encoded) -> dict[str, float]:
    """Return min, max, rms, crest factor and kurtosis of a weight, also a compressed one; see [`WeightStatistics`]."""
    return Values(weight).moments()


class Values:
    """The elements of a weight, in pieces that stay in the cache; where many have 16 bits, once for each value.

    Args:
        weight: finite, any float dtype and shape; a compressed one is decoded some channels at a time.
    """

    def __init__(self, weight: Tensor | Encoded) -> None:
        self._weight = weight
        self._count = weight.numel() if isinstance(weight, Tensor) else weight.shape.numel()
        counting = countable(weight.dtype, self._count)
        self._counted = count_values(self._parts(), weight.dtype) if counting else None
        ends = [torch.stack(values.aminmax()) for values, _ in self]
        self._low, self._high = min(end[0].item() for end in ends), max(end[1].item() for end in ends)

    def _parts(self) -> Iterator[Tensor]:
        if isinstance(self._weight, Tensor):
            yield self._weight.detach()
        else:
            yield from map(decode, bands(self._weight))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor | float]]:
        """Yield elements in float64, and how often each counts."""
        if self._counted is not None:
            yield self._counted
            return
        for part in self._parts():
            for _, (piece,) in pieces(part.reshape(1, -1)):
                yield piece[0].double(), 1.0

    @torch.no_grad()
    def moments(self) -> dict[str, float]:
        """Return min, max, rms, crest factor and kurtosis."""
        mean = sum((values * times).sum().item() for values, times in self) / self._count
        square = second = fourth = 0.0
        for values, times in self:
            square += (values.square() * times).sum().item()
            deviations = (values - mean).square_()
            second += (deviations * times).sum().item()
            fourth += (deviations.square_() * times).sum().item()
        rms, variance = math.sqrt(square / self._count), second / self._count
        return {
            "min": self._low,
            "max": self._high,
            "rms": rms,
            "crest_factor": max(-self._low, self._high) / rms if rms > 0 else 0.0,
            # Equal values leave no variance but rounding
            "kurtosis": fourth / self._count / variance**2 if self._low < self._high and variance**2 > 0 else 0.0,
        }

    @torch.no_grad()
    def sqnr(self, bits: int) -> float:
        """Return the SQNR in dB of what the uniform codec makes of the weight, with one symmetric min-max grid."""
        settings = CodecSettings("uniform", bits, "tensor")
        scale, _ = grid_of(*torch.tensor([[self._low], [self._high]], dtype=torch.float32), settings)
        offset = symmetric_offset(settings)
        signal = noise = 0.0
        for values, times in self:
            step = scale.to(values.device)
            decoded = (nearest(values[None].float(), step, offset, settings) - offset) * step
            signal += (values.square() * times).sum().item()
            noise += ((values - decoded[0].to(self._weight.dtype)).square_() * times).sum().item()
        return decibels(signal, noise)
