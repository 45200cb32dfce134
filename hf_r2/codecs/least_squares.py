"""Least-squares binary codec: every group has a basis of k scales, and the bits of a code are their signs.

A k-bit code stands for Σ v_i s_i: 2^k levels from k numbers, where a palette stores 2^k (Pouransari et al.,
arXiv 2001.02786). How the scales are found is in `binary_bases`.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_r2.codecs import binary_bases
from hf_r2.codecs.binary_bases import fold, nearest_codes, solve
from hf_r2.codecs.palette import look_up
from hf_r2.codecs.settings import CodecSettings
from hf_r2.grain import blocks, group_counts, join


def codebook_like(shape: Sequence[int], settings: CodecSettings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name the codebook tensors of a weight of this shape, with their shapes and dtypes."""
    return {"basis": ((sum(group_counts(shape, settings.grain)), settings.bits), torch.float32)}


def code_count(shape: Sequence[int], settings: CodecSettings) -> int:
    """Count the codes of a weight of this shape: one for every element."""
    return torch.Size(shape).numel()


def quantize(weight: Tensor, settings: CodecSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize a weight `(out, in, …)` to uint8 codes of its shape and a codebook (the scales of each group)."""
    basis = torch.cat([solve(block, settings.bits, settings.basis) for block in blocks(weight, settings.grain)])
    return assign(weight, basis, settings), {"basis": basis}


@torch.no_grad()
def assign(weight: Tensor, basis: Tensor, settings: CodecSettings) -> Tensor:
    """Give every element a code of its group's basis.

    Args:
        weight: `(out, in, …)`, any float dtype.
        basis: float32 `(groups, bits)`, every row descending.
        settings: grain, bits and kind of the basis.

    Returns:
        uint8 codes of the weight's shape: for three bits and more of an optimal basis the nearest level (at equal
        distance the smaller), else as the basis folds (see `binary_bases.fold`).
    """
    code = nearest_codes if settings.basis == "optimal" and settings.bits > 2 else fold
    parts = blocks(weight, settings.grain)
    bases = basis.split([len(block) for block in parts])
    codes = [code(block.float(), scales) for block, scales in zip(parts, bases, strict=True)]
    return join(codes, weight.shape, settings.grain)


def dequantize(
    codes: Tensor, codebook: dict[str, Tensor], settings: CodecSettings, shape: Sequence[int] | None = None
) -> Tensor:
    """Turn uint8 codes and their codebook into the float32 weight, of the codes' shape unless another is given."""
    shape = codes.shape if shape is None else torch.Size(shape)
    tables = levels(codebook, settings).split(group_counts(shape, settings.grain))
    return look_up(codes, tables, settings.grain, shape)


def levels(codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """List the values of all codes, float32 `(groups, 2^bits)`."""
    return binary_bases.levels(codebook["basis"])
