"""Palettes: every group has a look-up table (LUT) of 2^bits values, and codes index it.

The tables are the optimal one-dimensional k-means of the group. A table is sorted; codes name its nearest value.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.codecs.settings import CodecSettings
from hf_r2.grain import blocks, group_counts, join


def codebook_like(shape: Sequence[int], settings: CodecSettings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name the codebook tensors of a weight of this shape, with their shapes and dtypes."""
    return {"lut": ((sum(group_counts(shape, settings.grain)), 2**settings.bits), torch.float32)}


def quantize(weight: Tensor, settings: CodecSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize a weight `(out, in, …)` to uint8 codes of its shape and a codebook (the tables)."""
    parts = blocks(weight, settings.grain)
    tables = [kmeans_1d(block, 2**settings.bits) for block in parts]
    codes = [nearest(block.float(), table) for block, table in zip(parts, tables, strict=True)]
    return join(codes, weight.shape, settings.grain), {"lut": torch.cat(tables)}


def dequantize(codes: Tensor, codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """Turn uint8 codes `(out, in, …)` and their codebook into the float32 weight."""
    tables = codebook["lut"].split(group_counts(codes.shape, settings.grain))
    parts = [table.gather(1, code.long()) for code, table in zip(blocks(codes, settings.grain), tables, strict=True)]
    return join(parts, codes.shape, settings.grain)


def nearest(block: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest value of a sorted table `(groups, k)` for each element of a block `(groups, n)`, as uint8.

    An element halfway between two values takes the smaller one.
    """
    # Halved before they are added: the sum of two large float32 values could overflow
    midpoints = table[:, :-1] / 2 + table[:, 1:] / 2
    return torch.searchsorted(midpoints.contiguous(), block.contiguous()).to(torch.uint8)
