"""Where the elements of every row of a block lie: what units, temperatures and bins are chosen by."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_bins import COUNTED_PIECE, bands_of
from hf_r2.cells import cell_size
from hf_r2.grain import pieces

_SAMPLE = _CELL = 1 << 10


class Spread(NamedTuple):
    """Statistics of every row.

    Args:
        mean: `(groups,)` in float64.
        variance: the same.
        low: smallest elements, `(groups,)` in float32, in float64 of a float64 block.
        high: largest ones.
    """

    mean: Tensor
    variance: Tensor
    low: Tensor
    high: Tensor


def spread_of(block: Tensor) -> Spread:
    """Measure a block `(groups, n)`, any float dtype."""
    if block.is_cpu and block.dtype == torch.float32:
        low, high, mean, square = _ends_and_means(block)
        # While the mean is too near zero to cost digits
        if bool(((square > 1e-30) & (square < 1e30) & (mean.square() < 0.1 * square)).all()):
            return Spread(mean, square - mean.square(), low, high)
    else:
        dtype = torch.promote_types(block.dtype, torch.float32)
        low, high = block.amin(dim=1).to(dtype), block.amax(dim=1).to(dtype)
    return Spread(*_careful_moments(block, torch.maximum(high, -low)), low, high)


def _ends_and_means(block: Tensor) -> tuple[Tensor, ...]:
    """Read once: ends, mean and mean square. Sums of cells are taken in float32, then of these in float64."""
    low, high = torch.empty(2, len(block), dtype=torch.float32).unbind()
    sums, squares = torch.empty(2, len(block), dtype=torch.float64).unbind()
    for rows, parts in bands_of(block, size=COUNTED_PIECE):
        ends, cells, norms = [], [], []
        for (part,) in parts:
            piece = part.contiguous()
            in_cells = piece.view(len(piece), -1, cell_size(piece.shape[1], _CELL))
            ends += [piece.amin(dim=1), piece.amax(dim=1)]
            cells.append(in_cells.sum(dim=2))
            norms.append(torch.linalg.vector_norm(in_cells, dim=2))
        ends = torch.stack(ends)
        torch.amin(ends, dim=0, out=low[rows])
        torch.amax(ends, dim=0, out=high[rows])
        torch.sum(torch.cat(cells, dim=1), dim=1, dtype=torch.float64, out=sums[rows])
        torch.sum(torch.cat(norms, dim=1).double().square_(), dim=1, out=squares[rows])
    return low, high, sums / block.shape[1], squares / block.shape[1]


def _careful_moments(block: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance, around a typical value, in multiples of the largest: squares neither overflow nor vanish."""
    dtype = torch.promote_types(block.dtype, torch.float32)
    largest = largest.double()[:, None]
    unit = torch.where(largest > 1e-30, largest, 1)
    shift = (block[:, :_SAMPLE].to(dtype) / unit.to(dtype)).mean(dim=1, keepdim=True)
    factor = (1 / unit).to(dtype)
    sums = torch.zeros(2, len(block), dtype=torch.float64, device=block.device)
    for groups, (piece,) in pieces(block):
        values = (piece * factor[groups]).sub_(shift[groups])
        sums[0, groups] += values.sum(dim=1)
        sums[1, groups] += values.square_().sum(dim=1)
    mean, square = sums / block.shape[1]
    mean, variance = mean + shift[:, 0], (square - mean.square()).clamp_min(0)
    return mean * unit[:, 0], variance * unit[:, 0] ** 2
