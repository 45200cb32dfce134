"""Compressed weights as exporters write them: codes and codebooks in blocks of groups of one size."""

from dataclasses import dataclass

from torch import Tensor

from hf_r2.codecs import CODECS, Encoded, uniform
from hf_r2.codecs.bitpack import pack, unpack
from hf_r2.grain import cut, group_counts, group_sizes


@dataclass(frozen=True)
class Grid:
    """A block whose values are `(code − offset) · scale`.

    Args:
        codes: uint8 `(groups, elements of a group)`.
        scale: float32 `(groups, 1)`.
        offset: float32 `(groups, 1)`; whole numbers but for midrise grids.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor


@dataclass(frozen=True)
class Table:
    """A block whose values are the entries of a look-up table for every group.

    Args:
        codes: uint8 `(groups, codes of a group)`.
        entries: float32 `(groups, 2^bits, d)`: d consecutive elements share a code.
        size: elements of a group; the last vector may reach beyond them.
    """

    codes: Tensor
    entries: Tensor
    size: int


def blocks_of(encoded: Encoded) -> list[Grid] | list[Table]:
    """Lay out a compressed weight as one block, or two if its groups do not divide the channels.

    Values of a block `(groups, n)` become `(out, −1)`, those of two blocks stand side by side, and both together take
    the weight's shape: what `hf_r2.grain.join` does.
    """
    counts, sizes = group_counts(encoded.shape, encoded.grain), group_sizes(encoded.shape, encoded.grain)
    flat = unpack(encoded.codes, encoded.bits, encoded.code_count)
    if encoded.settings.method == "uniform":
        codes = cut(flat.reshape(encoded.shape), encoded.grain)
        scales = encoded.codebook["scale"][:, None].split(counts)
        offsets = uniform.offsets(encoded.codebook, encoded.settings)[:, None].split(counts)
        return [Grid(*parts) for parts in zip(codes, scales, offsets, strict=True)]
    d = encoded.settings.cluster_dim or 1
    lengths = [-(-size // d) for size in sizes]
    if d == 1:
        codes = cut(flat.reshape(encoded.shape), encoded.grain)
    else:
        parts = flat.split([count * length for count, length in zip(counts, lengths, strict=True)])
        codes = [part.view(count, length) for part, count, length in zip(parts, counts, lengths, strict=True)]
    levels = CODECS[encoded.settings.method].levels(encoded.codebook, encoded.settings)
    tables = levels.view(sum(counts), 2**encoded.bits, d).split(counts)
    return [Table(*parts) for parts in zip(codes, tables, sizes, strict=True)]


def packed_codes(codes: Tensor, bits: int) -> tuple[int, Tensor]:
    """Pack codes into the narrowest unsigned type of 2, 4 or 8 bits: its width, and flat uint8."""
    width = next(width for width in (2, 4, 8) if bits <= width)
    return width, pack(codes, width)
