"""Cells: short runs of a block's elements, so that a search for large elements touches few of them.

One pass over a block finds the largest magnitude of every cell; only cells whose peak matters are looked at again.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.grain import CPU_PIECE, pieces

CELL = 128
"""Elements of a cell, about."""


class PickedCells(NamedTuple):
    """Few cells of a block, by their position in it, with the group of each; int64 arrays."""

    index: np.ndarray
    groups: np.ndarray
    size: int

    def of(self, block: Tensor) -> np.ndarray:
        """Copy them from a block: `(cells, elements)`."""
        return block.view(-1, self.size).index_select(0, torch.from_numpy(self.index)).numpy()

    def write(self, block: Tensor, cells: np.ndarray) -> None:
        """Copy them to a block."""
        block.view(-1, self.size).index_copy_(0, torch.from_numpy(self.index), torch.from_numpy(cells))


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
    sample = sample_cells(block, 32)
    return int(np.count_nonzero(np.abs(sample.numpy()) > level.item())) * CELL > 0.5 * sample.numel()


def sample_cells(block: Tensor, count: int) -> Tensor:
    """Copy about so many cells from all over a block of one group: `(1, elements)`. Single elements cost as much."""
    cells = block.view(-1, cell_size(block.shape[1]))
    return cells[:: max(1, len(cells) // count)].reshape(1, -1)


def excess(block: Tensor, level: Tensor, picked: PickedCells | None) -> Tensor:
    """Sum what stands above the level, `max(|W| − level, 0)`, and count the elements that do.

    Args:
        block: `(groups, n)`.
        level: `(groups,)`, ≥ 0.
        picked: cells that hold all elements above the level; None for the whole block.

    Returns:
        Sums and counts, `(2, groups)` in float64.
    """
    if picked is not None:
        above = np.maximum(np.abs(picked.of(block)) - level.numpy()[picked.groups, None], 0)
        per_cell = above.sum(axis=1), np.count_nonzero(above, axis=1)
        found = np.stack([np.bincount(picked.groups, each, len(level)) for each in per_cell])
        return torch.from_numpy(found.astype(np.float64, copy=False))  # of nothing, NumPy counts integers
    if block.is_cpu and len(block) == 1:
        return torch.tensor(_excess_of_one(block.view(-1), level.item()), dtype=torch.float64)[:, None]
    results = torch.zeros(2, len(level), dtype=torch.float64, device=block.device)
    for band, (piece,) in pieces(block):
        above = piece.abs().sub_(level[band, None]).relu_()
        results[0, band] += above.sum(dim=1)
        results[1, band] += above.sign_().sum(dim=1)
    return results


def _excess_of_one(group: Tensor, level: float) -> tuple[float, float]:
    total, count = 0.0, 0.0
    buffer, split = cached_pieces(group)
    for piece in split:
        above = torch.abs(piece, out=buffer[: len(piece)]).sub_(level).relu_()
        total += above.sum().item()
        count += above.sign_().sum().item()
    return total, count


def cached_pieces(group: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Cut a vector on a CPU into pieces that stay in the cache, beside a buffer for what is computed from one."""
    size = min(len(group), CPU_PIECE * torch.get_num_threads())
    return group.new_empty(size), group.split(size)
