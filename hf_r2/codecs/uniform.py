"""Uniform quantization: equally spaced levels, a scale per group and, for affine grids, a zero point.

All grids are one formula, `value = (code − offset) · scale`, with unsigned codes of b bits:

| grid | scale for the range r = max|W| | offset | codes used |
|---|---|---|---|
| restricted | r / (2^(b−1) − 1) | 2^(b−1) | 1 … 2^b − 1: levels −r … r, zero among them |
| full | r / ((2^b − 1) / 2) | 2^(b−1) | 0 … 2^b − 1: one more level below zero than above |
| midrise | r / 2^(b−1) | 2^(b−1) − ½ | 0 … 2^b − 1: centres of 2^b equal cells of [−r, r], zero not among them |
| affine | (max(W, 0) − min(W, 0)) / (2^b − 1) | zero point, a whole number | 0 … 2^b − 1 |
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_r2.codecs.settings import CodecSettings
from hf_r2.grain import blocks, group_counts, join

_COARSE, _FINE = 128, 33  # candidates of the two passes of the range search


def codebook_like(shape: Sequence[int], settings: CodecSettings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name the codebook tensors of a weight of this shape, with their shapes and dtypes."""
    groups = sum(group_counts(shape, settings.grain))
    tensors = {"scale": ((groups,), torch.float32)}
    if not settings.symmetric:
        tensors["zero"] = ((groups,), torch.uint8)
    return tensors


def code_count(shape: Sequence[int], settings: CodecSettings) -> int:
    """Count the codes of a weight of this shape: one for every element."""
    return torch.Size(shape).numel()


def quantize(weight: Tensor, settings: CodecSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize a weight `(out, in, …)` to uint8 codes of its shape and a codebook (scale and, if affine, zero)."""
    codes, scales, offsets = [], [], []
    for block in blocks(weight, settings.grain):
        block = block.float()
        scale, offset = _min_max(block, settings)
        if settings.range == "mse":
            scale = _least_squared_error(block, scale, offset, settings)
        codes.append(_round(block, scale, offset, settings).to(torch.uint8))
        scales.append(scale)
        offsets.append(offset)
    codebook = {"scale": torch.cat(scales)}
    if not settings.symmetric:
        codebook["zero"] = torch.cat(offsets).to(torch.uint8)
    return join(codes, weight.shape, settings.grain), codebook


def dequantize(
    codes: Tensor, codebook: dict[str, Tensor], settings: CodecSettings, shape: Sequence[int] | None = None
) -> Tensor:
    """Turn uint8 codes and their codebook into the float32 weight, of the codes' shape unless another is given."""
    codes = codes if shape is None else codes.reshape(tuple(shape))
    counts = group_counts(codes.shape, settings.grain)
    offset = codebook["zero"].float() if "zero" in codebook else _symmetric_offset(codebook["scale"], settings)
    parts = zip(blocks(codes, settings.grain), codebook["scale"].split(counts), offset.split(counts), strict=True)
    return join([(code - off[:, None]) * scale[:, None] for code, scale, off in parts], codes.shape, settings.grain)


def _symmetric_offset(like: Tensor, settings: CodecSettings) -> Tensor:
    half = 2 ** (settings.bits - 1)
    return torch.full_like(like, half - 0.5 if settings.grid == "midrise" else half)


def _min_max(block: Tensor, settings: CodecSettings) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group of a block `(groups, n)` that cover all of its elements."""
    half = 2 ** (settings.bits - 1)
    if settings.symmetric:
        steps = {"restricted": half - 1, "full": (2 * half - 1) / 2, "midrise": half}[str(settings.grid)]
        scale = block.abs().amax(dim=1) / steps
        return scale, _symmetric_offset(scale, settings)
    low, high = block.amin(dim=1).clamp_max(0), block.amax(dim=1).clamp_min(0)
    steps = 2 * half - 1
    scale = high / steps - low / steps
    return scale, (-low / _divisor(scale)).round().clamp_max(steps)


def _divisor(scale: Tensor) -> Tensor:
    """Return the scale, or 1 for a group of zeros, whose scale is 0: its codes then decode to 0 again."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def _round(block: Tensor, scale: Tensor, offset: Tensor, settings: CodecSettings) -> Tensor:
    """Nearest code of each element, still in float32."""
    lowest = 1 if settings.grid == "restricted" else 0
    return (block / _divisor(scale)[:, None] + offset[:, None]).round().clamp(lowest, 2**settings.bits - 1)


def _least_squared_error(block: Tensor, full: Tensor, offset: Tensor, settings: CodecSettings) -> Tensor:
    """Search the scale of least squared error for each group, from the min-max scale downwards.

    The error has many local minima, close together at many bits and far below the full range under outliers. So one
    pass looks everywhere between the full range and half the rms (hardly ever is a grid best below that), in steps that
    shrink towards small ranges, and a second one at equal steps between the neighbours of its best candidate.
    """
    rms = block.square().mean(dim=1).sqrt()
    least = (0.5 * rms / block.abs().amax(dim=1).clamp_min(torch.finfo(block.dtype).tiny)).clamp(1e-6, 1)

    def errors(shares: Tensor) -> Tensor:
        """Squared error for each of `(candidates, groups)` shares of the full scale."""
        scales = shares * full
        return torch.stack(
            [
                ((_round(block, scale, offset, settings) - offset[:, None]) * scale[:, None] - block)
                .square()
                .sum(dim=1)
                for scale in scales
            ]
        )

    coarse = least + (1 - least) * torch.linspace(1, 0, _COARSE, device=block.device)[:, None] ** 1.5
    index = errors(coarse).argmin(dim=0, keepdim=True)
    upper, lower = coarse.gather(0, (index - 1).clamp_min(0)), coarse.gather(0, (index + 1).clamp_max(_COARSE - 1))
    between = lower + (upper - lower) * torch.linspace(0, 1, _FINE, device=block.device)[:, None]
    fine = torch.cat([coarse.gather(0, index), between])
    return fine.gather(0, errors(fine).argmin(dim=0, keepdim=True))[0] * full
