"""Uniform quantization: equally spaced levels, a scale per group and, for affine grids, a zero point.

All grids are one formula, `value = (code − offset) · scale`, with unsigned codes of b bits; 1 bit is midrise:

| grid | scale for the range r = max|W| | offset | codes used |
|---|---|---|---|
| restricted | r / (2^(b−1) − 1) | 2^(b−1) | 1 … 2^b − 1: levels −r … r, zero among them |
| full | r / ((2^b − 1) / 2) | 2^(b−1) | 0 … 2^b − 1: one more level below zero than above |
| midrise | r / 2^(b−1) | 2^(b−1) − ½ | 0 … 2^b − 1: centres of 2^b equal cells of [−r, r], zero not among them |
| affine | (max(W, 0) − min(W, 0)) / (2^b − 1) | zero point, a whole number | 0 … 2^b − 1 |

With `range="percentile"` percentiles take the places of the extremes; elements beyond them get the outermost codes.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from hf_r2.codecs.settings import CodecSettings
from hf_r2.grain import blocks, group_counts, join

_COARSE, _FINE = 128, 33  # candidates of the two passes of the range search
_PART = 1 << 20  # elements that are searched for a percentile at a time


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
        scale, offset = _covering(block, settings)
        if settings.range == "mse":
            scale = _least_squared_error(block, scale, offset, settings)
        codes.append(nearest(block, scale, offset[:, None], settings).to(torch.uint8))
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
    parts = _with_grids(codes, codebook, settings)
    return join([(code - off[:, None]) * scale[:, None] for code, scale, off in parts], codes.shape, settings.grain)


def unrounded(weight: Tensor, codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """Place a weight `(out, in, …)` on its grid: float32 codes with fractions, beyond the limits for outliers."""
    parts = _with_grids(weight, codebook, settings)
    places = [_unrounded(block.float(), scale, offset[:, None]) for block, scale, offset in parts]
    return join(places, weight.shape, settings.grain)


def code_limits(settings: CodecSettings) -> tuple[int, int]:
    """Return the lowest and the highest code that is used."""
    return 1 if settings.grid == "restricted" else 0, 2**settings.bits - 1


def levels(codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """List the values of all codes, float32 `(groups, 2^bits)`; infinity for a code that is not used."""
    codes = torch.arange(2**settings.bits, dtype=torch.float32, device=codebook["scale"].device)
    table = (codes - offsets(codebook, settings)[:, None]) * codebook["scale"][:, None]
    return table.masked_fill(codes < code_limits(settings)[0], torch.inf)


def offsets(codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """Return the offset of every group's grid, float32 `(groups,)`."""
    return codebook["zero"].float() if "zero" in codebook else _symmetric_offset(codebook["scale"], settings)


def _with_grids(weight: Tensor, codebook: dict[str, Tensor], settings: CodecSettings) -> Iterator[tuple[Tensor, ...]]:
    """Cut a weight, or its codes, into blocks, each with the scales and offsets of its groups."""
    counts = group_counts(weight.shape, settings.grain)
    grids = codebook["scale"].split(counts), offsets(codebook, settings).split(counts)
    return zip(blocks(weight, settings.grain), *grids, strict=True)


def symmetric_offset(settings: CodecSettings) -> float:
    """Return the offset of a symmetric grid."""
    return 2 ** (settings.bits - 1) - (0.5 if settings.grid == "midrise" else 0)


def _symmetric_offset(like: Tensor, settings: CodecSettings) -> Tensor:
    return torch.full_like(like, symmetric_offset(settings))


def _covering(block: Tensor, settings: CodecSettings) -> tuple[Tensor, Tensor]:
    """Scale and offset of each group of a block `(groups, n)` that cover its elements, or the percentile of them."""
    low, high = block.amin(dim=1), block.amax(dim=1)
    scale, offset = grid_of(low, high, settings)
    if settings.percentile is None:
        return scale, offset
    if settings.symmetric:
        high = percentile(block.abs(), settings.percentile)
        low = -high
    else:
        low, high = -percentile(-block, settings.percentile), percentile(block, settings.percentile)
    inner_scale, inner_offset = grid_of(low, high, settings)
    # A group of nearly nothing but zeros has no range up to its percentile, and keeps its whole range
    found = inner_scale > 0
    return torch.where(found, inner_scale, scale), torch.where(found, inner_offset, offset)


def grid_of(low: Tensor, high: Tensor, settings: CodecSettings) -> tuple[Tensor, Tensor]:
    """Return scale and offset of the grids that cover the values between low and high, all `(groups,)` in float32."""
    half = 2 ** (settings.bits - 1)
    if settings.symmetric:
        steps = {"restricted": half - 1, "full": (2 * half - 1) / 2, "midrise": half}[str(settings.grid)]
        scale = torch.maximum(low.abs(), high.abs()) / torch.full_like(high, steps)
        return scale, _symmetric_offset(scale, settings)
    low, high = low.clamp_max(0), high.clamp_min(0)
    # By a tensor: a device multiplies by the inverse of a number, which rounds otherwise
    steps = torch.full_like(high, 2 * half - 1)
    scale = high / steps - low / steps
    return scale, (-low / divisor(scale)).round().clamp_max(2 * half - 1)


def percentile(block: Tensor, percentage: float) -> Tensor:
    """Percentile of each group, linear between the two elements next to its rank, as NumPy's default.

    Only the elements from the rank upwards are kept while a block is walked through, so that the memory is bounded by
    those, and the work is linear in the elements.

    Args:
        block: `(groups, n)`, float32.
        percentage: 0–100; memory is least near 100.

    Returns:
        float32 `(groups,)`.
    """
    n = block.shape[1]
    rank = (n - 1) * percentage / 100
    kept = n - int(rank)
    found = []
    for band in block.split(max(1, _PART // n)):
        top = band[:, :0]
        for part in band.split(max(_PART, kept), dim=1):
            joined = torch.cat([top, part], dim=1)
            top = joined.topk(min(kept, joined.shape[1]), dim=1, sorted=False).values
        ends = top.topk(min(2, kept), dim=1, largest=False).values
        found.append(torch.lerp(ends[:, 0], ends[:, -1], rank - int(rank)))
    return torch.cat(found)


def divisor(scale: Tensor) -> Tensor:
    """Return the scale, or 1 for a group of zeros, whose scale is 0: its codes then decode to 0 again."""
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def nearest(block: Tensor, scale: Tensor, offset: Tensor | float, settings: CodecSettings) -> Tensor:
    """Find the nearest code of each element.

    Args:
        block: `(groups, n)`, float32.
        scale: `(groups,)`, not negative.
        offset: a number, or a tensor that a block can be added to.
        settings: bits and grid.

    Returns:
        Codes, still in float32, shape of the block.
    """
    return _unrounded(block, scale, offset).round().clamp(*code_limits(settings))


def _unrounded(block: Tensor, scale: Tensor, offset: Tensor | float) -> Tensor:
    return block / divisor(scale)[:, None] + offset


def _least_squared_error(block: Tensor, full: Tensor, offset: Tensor, settings: CodecSettings) -> Tensor:
    """Search the scale of least squared error for each group, from the min-max scale downwards.

    The error has many local minima, close together at many bits and far below the full range under outliers. So one
    pass looks everywhere between the full range and half the rms (hardly ever is a grid best below that), in steps that
    shrink towards small ranges, and a second one at equal steps between the neighbours of its best candidate. Of one
    bit, the best levels ±scale / 2 are ±E|W|, which may lie beyond those of the full range.
    """
    if settings.bits == 1:
        return 2 * block.abs().mean(dim=1)
    rms = block.square().mean(dim=1).sqrt()
    least = (0.5 * rms / block.abs().amax(dim=1).clamp_min(torch.finfo(block.dtype).tiny)).clamp(1e-6, 1)

    def errors(shares: Tensor) -> Tensor:
        """Squared error for each of `(candidates, groups)` shares of the full scale."""
        scales = shares * full
        return torch.stack(
            [
                ((nearest(block, scale, offset[:, None], settings) - offset[:, None]) * scale[:, None] - block)
                .square()
                .sum(dim=1)
                for scale in scales
            ]
        )

    coarse = least + (1 - least) * torch.linspace(1, 0, _COARSE, dtype=block.dtype, device=block.device)[:, None] ** 1.5
    index = errors(coarse).argmin(dim=0, keepdim=True)
    upper, lower = coarse.gather(0, (index - 1).clamp_min(0)), coarse.gather(0, (index + 1).clamp_max(_COARSE - 1))
    between = lower + (upper - lower) * torch.linspace(0, 1, _FINE, dtype=block.dtype, device=block.device)[:, None]
    fine = torch.cat([coarse.gather(0, index), between])
    return fine.gather(0, errors(fine).argmin(dim=0, keepdim=True))[0] * full
