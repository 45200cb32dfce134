"""Cells: short runs of a block's elements, so that a search for large elements touches few of them.

One pass over a block finds the largest magnitude of every cell; only cells whose peak matters are looked at again.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.grain import pieces

CELL = 128
"""Elements of a cell, about."""


class PickedCells(NamedTuple):
    """Few cells of a block, by their position in it, with the group of each; int64 arrays."""

    index: np.ndarray
    groups: np.ndarray
    size: int

    def of(self, block: Tensor) -> np.ndarray:
        """Copy them from a block: `(cells, elements)`."""
        return as_array(block).reshape(-1, self.size)[self.index]


def as_array(values: Tensor) -> np.ndarray:
    """View a tensor on a CPU as an array. After `values.numpy()`, FSDP2 could no longer free the tensor's storage."""
    return np.from_dlpack(values)


def cell_size(n: int) -> int:
    """Elements of the cells that n elements are cut into: a divisor of n, `CELL` or less if one is near, else more."""
    return _divisor_near(n, CELL)


@cache
def _divisor_near(n: int, limit: int) -> int:
    below = next(size for size in range(min(n, limit), 0, -1) if n % size == 0)
    return below if 8 * below >= min(n, limit) else next(size for size in range(limit, n + 1) if n % size == 0)


def cell_peaks(block: Tensor) -> Tensor:
    """Largest magnitude of every cell of a block `(groups, n)`: `(groups, cells)`, with cells of one size."""
    groups, n = block.shape
    if block.numel() == 0:
        return block.new_zeros(groups, 1)
    size = cell_size(n)
    cells = block.view(groups * (n // size), size)
    # amax(|W|) would first build |W|
    return torch.maximum(cells.amax(dim=1), cells.amin(dim=1).neg_()).view(groups, n // size)


def pick_cells(block: Tensor, peaks: Tensor, level: Tensor, above: bool = False) -> PickedCells | None:
    """Pick the cells whose peak is at the level of their group, `(groups,)`, or above it.

    NumPy does this and what follows: on arrays of this size it takes a third of torch's time per call.

    Returns:
        The cells; None if they are so many that a pass over the whole block costs less, and on an accelerator, where
        the host would have to wait to learn how many they are.
    """
    if not block.is_cpu or block.numel() == 0:
        return None
    found, wanted = peaks.numpy(), level.numpy()[:, None]
    # Not `found > wanted`: a cell that holds NaN is picked too, so that what is computed from it tells
    index = (~(found <= wanted) if above else found == wanted).ravel().nonzero()[0]
    if 4 * index.size > found.size:
        return None
    return PickedCells(index, index // found.shape[1], block.shape[1] // found.shape[1])


def crowded(block: Tensor, level: Tensor) -> bool:
    """Tell from a sample whether so many elements exceed the level that most cells would be picked."""
    if not block.is_cpu or len(block) > 1 or block.shape[1] < 1 << 14:
        return False
    sample = block[0, :: block.shape[1] >> 12]
    return int((sample.abs() > level).sum()) * CELL > 0.5 * len(sample)


def excess(block: Tensor, level: Tensor, picked: PickedCells | None) -> Tensor:
    """Sum what stands above the level, `max(|W| − level, 0)`, and count the elements that do.

    Args:
        block: `(groups, n)`.
        level: `(groups,)`, ≥ 0.
        picked: cells that hold all elements above the level; None for the whole block.

    Returns:
        Sums and counts, `(2, groups)` in float64.
    """
    results = torch.zeros(2, len(level), dtype=torch.float64, device=block.device)
    if picked is not None:
        groups = torch.from_numpy(picked.groups)
        above = torch.from_numpy(picked.of(block)).abs_().sub_(level[groups, None]).relu_()
        return results.index_add_(1, groups, torch.stack([above.sum(dim=1), (above > 0).sum(dim=1)]).double())
    for band, (piece,) in pieces(block):
        above = piece.abs().sub_(level[band, None]).relu_()
        results[0, band] += above.sum(dim=1)
        results[1, band] += above.sign_().sum(dim=1)
    return results
