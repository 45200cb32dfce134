"""Palettes: every group has a look-up table (LUT) of 2^bits entries, and codes index it.

An entry is one value (`cluster_dim` 1) or a vector of d values, which consecutive elements of a group share: b bits of
code over d elements are b/d bits per weight, plus the tables (Cho et al., DKM, arXiv 2108.12659, its multi-dimensional
clusters). Tables of values are the optimal one-dimensional k-means of the group and ascend; tables of vectors come from
k-means and are in lexicographic order. A code names the nearest entry.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.codecs.kmeans_vectors import kmeans_vectors, nearest_vector
from hf_r2.codecs.settings import CodecSettings
from hf_r2.grain import Grain, cut, group_counts, group_sizes, join, pieces

_COUNTED = 16  # entries of a table up to which codes are found by comparing with all of them


def codebook_like(shape: Sequence[int], settings: CodecSettings) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Name the codebook tensors of a weight of this shape, with their shapes and dtypes."""
    size = (sum(group_counts(shape, settings.grain)), 2**settings.bits)
    return {"lut": (size if settings.cluster_dim == 1 else (*size, settings.cluster_dim), torch.float32)}


def code_count(shape: Sequence[int], settings: CodecSettings) -> int:
    """Count the codes of a weight of this shape: ⌈n / d⌉ for a group of n elements."""
    return sum(groups * codes for groups, codes in _code_shapes(shape, settings))


def quantize(weight: Tensor, settings: CodecSettings) -> tuple[Tensor, dict[str, Tensor]]:
    """Quantize a weight `(out, in, …)` to uint8 codes, shaped as those of [`assign`], and a codebook (the tables)."""
    k = 2**settings.bits
    parts = cut(weight, settings.grain)
    if settings.cluster_dim == 1:
        lut = torch.cat([kmeans_1d(block, k) for block in parts])
    else:
        lut = torch.cat([kmeans_vectors(vectors(block.float(), settings.cluster_dim), k) for block in parts])
    return assign(weight, lut, settings), {"lut": lut}


@torch.no_grad()
def assign(weight: Tensor, lut: Tensor, settings: CodecSettings) -> Tensor:
    """Give every element, or every vector of elements, the code of the nearest entry of its group's table.

    Args:
        weight: `(out, in, …)`, any float dtype.
        lut: the tables, float32, `(groups, 2^bits)` with every row ascending, or for `cluster_dim` d > 1
            `(groups, 2^bits, d)` in any order.
        settings: grain and `cluster_dim` of the weight.

    Returns:
        uint8 codes, of the weight's shape for `cluster_dim` 1, else flat `(code_count,)`: block by block of the grain,
        in a block group by group. At equal distances the lowest code wins.
    """
    parts = cut(weight, settings.grain)
    tables = lut.split([len(block) for block in parts])
    if settings.cluster_dim == 1:
        codes = [nearest(block, table) for block, table in zip(parts, tables, strict=True)]
        return join(codes, weight.shape, settings.grain)
    pairs = zip(parts, tables, strict=True)
    return torch.cat(
        [nearest_vector(vectors(block.float(), settings.cluster_dim), table).flatten() for block, table in pairs]
    )


def dequantize(
    codes: Tensor, codebook: dict[str, Tensor], settings: CodecSettings, shape: Sequence[int] | None = None
) -> Tensor:
    """Turn codes and their codebook into the float32 weight.

    Args:
        codes: uint8, flat or, for `cluster_dim` 1, of the weight's shape.
        codebook: the tables, as [`codebook_like`] names them.
        settings: grain and `cluster_dim` of the weight.
        shape: the weight's shape, output channels first; needed where the codes do not have it.
    """
    shape = codes.shape if shape is None else torch.Size(shape)
    tables = codebook["lut"].split(group_counts(shape, settings.grain))
    if settings.cluster_dim == 1:
        return look_up(codes, tables, settings.grain, shape)
    runs = _code_shapes(shape, settings)
    flat = codes.split([groups * count for groups, count in runs])
    entries = [_look_up(c.view(run), t) for c, run, t in zip(flat, runs, tables, strict=True)]
    sizes = group_sizes(shape, settings.grain)
    return join([part[:, :size] for part, size in zip(entries, sizes, strict=True)], shape, settings.grain)


def levels(codebook: dict[str, Tensor], settings: CodecSettings) -> Tensor:
    """List the values of all codes, float32 `(groups, 2^bits)`, for `cluster_dim` 1."""
    return codebook["lut"]


def vectors(block: Tensor, d: int) -> Tensor:
    """Cut the groups of a block `(groups, n)` into vectors `(groups, ⌈n / d⌉, d)` of consecutive elements.

    If d does not divide n, the last vector is completed with the group's first elements, around and around if n < d.
    """
    n = block.shape[1]
    missing = torch.arange(-n % d, device=block.device) % n
    return torch.cat([block, block[:, missing]], dim=1).view(len(block), -1, d)


def nearest(block: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest value of a sorted table `(groups, k)` for each element of a block `(groups, n)`, as uint8.

    An element halfway between two values takes the smaller one.
    """
    # Halved before they are added: the sum of two large float32 values could overflow
    midpoints = (table[:, :-1] / 2 + table[:, 1:] / 2).contiguous()
    codes = torch.zeros(block.shape, dtype=torch.uint8, device=block.device)
    # On a CPU it is faster to count the midpoints below an element than to search, unless there are many
    count = block.is_cpu and table.shape[1] <= _COUNTED
    for band, (piece, code) in pieces(block, codes):
        piece = piece.float()
        if count:
            for midpoint in midpoints[band].unbind(dim=1):
                code += piece > midpoint[:, None]
        else:
            code.copy_(torch.searchsorted(midpoints[band], piece.contiguous()))
    return codes


def look_up(codes: Tensor, tables: Sequence[Tensor], grain: Grain, shape: Sequence[int]) -> Tensor:
    """Take for every code its entry of its group's table.

    Args:
        codes: uint8, as many as the shape has elements.
        tables: float32 `(groups, k)`, one for each block of the grain.
        grain: of the weight.
        shape: of the weight, output channels first.

    Returns:
        float32, of the shape.
    """
    parts = []
    for block, table in zip(cut(codes.reshape(tuple(shape)), grain), tables, strict=True):
        groups, k = table.shape
        entries, flat = table.new_empty(block.shape), table.flatten()
        first = k * torch.arange(groups, dtype=torch.int32, device=table.device)[:, None]
        for band, (code, entry) in pieces(block, entries):
            places = code.int() + first[band] if groups > 1 else code.int()
            entry.copy_(flat.index_select(0, places.flatten()).view(code.shape))
        parts.append(entries)
    return join(parts, shape, grain)


def _code_shapes(shape: Sequence[int], settings: CodecSettings) -> list[tuple[int, int]]:
    """Count the groups, and the codes of a group, in each block of the grain."""
    counts, sizes = group_counts(shape, settings.grain), group_sizes(shape, settings.grain)
    return [(groups, -(-size // settings.cluster_dim)) for groups, size in zip(counts, sizes, strict=True)]


def _look_up(codes: Tensor, tables: Tensor) -> Tensor:
    """Entries of codes `(groups, m)` in tables `(groups, k, d)`, side by side: `(groups, m · d)`."""
    groups, k, _ = tables.shape
    rows = codes + k * torch.arange(groups, device=codes.device)[:, None]
    return tables.flatten(0, 1)[rows].flatten(1)
