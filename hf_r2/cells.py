"""Cells: short runs of a block's elements, so that a search for large elements touches few of them.

One pass over the blocks finds the largest magnitude of every cell; only cells whose peak matters are looked at again.
Cells and groups are counted through the blocks, so that what is done between the passes is done once for all weights.
"""

import math
from collections.abc import Iterator, Sequence
from functools import cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.fusing import fused
from hf_r2.grain import CPU_PIECE, pieces

CELL = 128
"""Elements of a cell, about."""

CACHED = 1 << 17
"""Elements that are still in the cache when they are read for the second time."""


class PickedCells(NamedTuple):
    """Few cells, all of one size.

    Args:
        size: elements of a cell.
        index: by the positions of their blocks, the positions of the cells in the block, int64.
        groups: of each cell, counted through all blocks, int64.
    """

    size: int
    index: dict[int, Tensor]
    groups: np.ndarray

    @property
    def counts(self) -> list[int]:
        """Number of the cells in each block."""
        return [index.numel() for index in self.index.values()]

    def of(self, blocks: Sequence[Tensor]) -> np.ndarray:
        """Copy them from their blocks: `(cells, elements)`."""
        found = blocks[0].new_empty(len(self.groups), self.size)
        for b, index, part in self._cut(found):
            torch.index_select(blocks[b].view(-1, self.size), 0, index, out=part)
        return found.numpy()

    def only(self, mask: np.ndarray) -> "PickedCells":
        """Pick single elements of them, cells of size 1, by a mask `(cells, elements)`."""
        cell, column = mask.nonzero()
        stops = np.searchsorted(cell, np.cumsum(self.counts))
        places = torch.cat(list(self.index.values())).numpy()[cell] * self.size + column
        parts = torch.from_numpy(places).split(np.diff(stops, prepend=0).tolist())
        return PickedCells(1, dict(zip(self.index, parts, strict=True)), self.groups[cell])

    def write(self, blocks: Sequence[Tensor], cells: np.ndarray) -> None:
        """Copy them to blocks."""
        for b, index, part in self._cut(torch.from_numpy(cells)):
            blocks[b].view(-1, self.size).index_copy_(0, index, part)

    def add(self, blocks: Sequence[Tensor], cells: np.ndarray) -> None:
        """Add to them in blocks."""
        if self.size > 1:  # rows one by one are slow to add to
            self.write(blocks, np.add(cells, self.of(blocks), out=cells))
            return
        for b, index, part in self._cut(torch.from_numpy(cells[:, 0])):
            blocks[b].view(-1).index_add_(0, index, part)

    def _cut(self, values: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Cut one value per cell to the blocks: their positions, those of the cells in them, and the values."""
        return zip(self.index, self.index.values(), values.split(self.counts), strict=True)


class Picked(NamedTuple):
    """What is to be looked at again.

    Args:
        cells: batches of cells, each of so few blocks that their copies stay small.
        whole: positions of the blocks with so many that a pass over all of it costs less, and of all on an accelerator,
            where the host would have to wait to learn how many they are.
    """

    cells: list[PickedCells]
    whole: list[int]

    def above(self, blocks: Sequence[Tensor], level: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Copy the magnitudes in the cells that are above the level of their group, and the groups of them."""
        found = [(np.zeros(0, np.float32), np.zeros(0, np.int64))]
        for cells in self.cells:
            magnitudes = np.abs(cells.of(blocks))
            cell, column = (~(magnitudes <= level.numpy()[cells.groups, None])).nonzero()  # NaN, too
            found.append((magnitudes[cell, column], cells.groups[cell]))
        return tuple(map(np.concatenate, zip(*found, strict=True)))


class Cells:
    """The cells of some blocks, and their largest magnitudes.

    Args:
        blocks: contiguous, `(groups, elements)` each.
        crowded: for each block, whether it is to be picked as a whole anyway, and not to be read; see [`crowded`].
        level: `(groups,)`: only peaks above it are asked for. On a CPU, cells of large groups are then looked at only
            in chunks that have one.

    Attributes:
        peaks: largest magnitude of each cell, `(cells,)`, or 0 where it is not asked for, and in crowded blocks.
        cells_of_groups: how many each group has.
        ends: of each group, the number of cells up to its last one.
    """

    def __init__(
        self,
        blocks: Sequence[Tensor],
        crowded: Sequence[bool] | None = None,
        level: Tensor | None = None,
    ) -> None:
        self.blocks = blocks
        self.crowded = crowded or [False] * len(blocks)
        self.groups = [block.shape[0] for block in blocks]  # quicker than len
        self.sizes = [cell_size(block.shape[1]) for block in blocks]
        self.per_group = [max(1, block.shape[1] // size) for block, size in zip(blocks, self.sizes, strict=True)]
        self.counts = [groups * cells for groups, cells in zip(self.groups, self.per_group, strict=True)]
        self.cells_of_groups = np.repeat(self.per_group, self.groups)
        self.ends = np.cumsum(self.cells_of_groups)
        self.peaks, low = (blocks[0].new_zeros(sum(self.counts)) for _ in range(2))
        ends = zip(self.peaks.split(self.counts), low.split(self.counts), strict=True)
        levels = [None] * len(blocks) if level is None else level.split(self.groups)
        for index, (block, pair, above) in enumerate(zip(blocks, ends, levels, strict=True)):
            if self.crowded[index] or not block.numel():
                continue
            if above is not None and self.groups[index] == 1 and block.is_cpu and block.numel() > CACHED:
                _find_ends_above(block.view(-1, self.sizes[index]), *pair, above.item())
            else:
                _find_ends(block.view(-1, self.sizes[index]), *pair)
        torch.maximum(self.peaks, low.neg_(), out=self.peaks)

    def tops(self) -> Tensor:
        """Largest magnitude of each group, `(groups,)`."""
        if self.peaks.is_cpu and len(self.peaks):
            return torch.from_numpy(np.maximum.reduceat(self.peaks.numpy(), np.append(0, self.ends[:-1])))
        return torch.cat([part.amax(dim=1) for part in self.split_peaks()])

    def split_peaks(self) -> list[Tensor]:
        """Cut the peaks to those of each block, `(groups, cells of a group)`."""
        parts = self.peaks.split(self.counts)
        return [part.view(-1, cells) for part, cells in zip(parts, self.per_group, strict=True)]

    def pick(self, level: Tensor, above: bool = False) -> Picked:
        """Pick the cells whose peak is at the level of their group, `(groups,)`, or above it.

        NumPy does this and what follows: on arrays of this size it takes a third of torch's time per call.
        """
        if not self.peaks.is_cpu:
            return Picked([], list(range(len(self.blocks))))
        found, wanted = self.peaks.numpy(), np.repeat(level.numpy(), self.cells_of_groups)
        # Not `found > wanted`: a cell that holds NaN is picked too, so that what is computed from it tells
        index = (~(found <= wanted) if above else found == wanted).nonzero()[0]
        starts = np.cumsum([0, *self.counts])
        stops = np.searchsorted(index, starts)
        groups = np.searchsorted(self.ends, index, side="right")
        picked = np.diff(stops)
        many = [4 * found > count for found, count in zip(picked, self.counts, strict=True)]
        whole = [b for b, block in enumerate(self.blocks) if many[b] or self.crowded[b] or not block.numel()]
        batches = []
        for members in self._batches(picked, set(picked.nonzero()[0].tolist()) - set(whole)):
            ranges = [slice(stops[b], stops[b + 1]) for b in members]
            places = {b: torch.from_numpy(index[r] - starts[b]) for b, r in zip(members, ranges, strict=True)}
            batches.append(PickedCells(self.sizes[members[0]], places, np.concatenate([groups[r] for r in ranges])))
        return Picked(batches, whole)

    def _batches(self, picked: np.ndarray, members: set[int]) -> list[list[int]]:
        """Put blocks with cells of one size together as long as their picked cells hold no more than a piece."""
        batches: list[list[int]] = []
        room, size = 0, 0
        for b in sorted(members, key=lambda b: (-self.sizes[b], b)):
            elements = picked[b] * self.sizes[b]
            room -= elements
            if room < 0 or self.sizes[b] != size:
                batches.append([])
                room, size = CPU_PIECE - elements, self.sizes[b]
            batches[-1].append(b)
        return batches

    def excess(self, level: Tensor, picked: Picked) -> Tensor:
        """Sum what stands above the level, `max(|W| − level, 0)`, and count the elements that do.

        Args:
            level: `(groups,)`, ≥ 0.
            picked: what holds all elements above the level.

        Returns:
            Sums and counts, `(groups, 2)` in float64.
        """
        found = torch.zeros(len(level), 2, dtype=torch.float64, device=level.device)
        for cells in picked.cells:
            above = np.maximum(np.abs(cells.of(self.blocks)) - level.numpy()[cells.groups, None], 0)
            for column, per_cell in enumerate((above.sum(axis=1), np.count_nonzero(above, axis=1))):
                found.numpy()[:, column] += np.bincount(cells.groups, per_cell, len(level))
        parts, levels = found.split(self.groups), level.split(self.groups)
        for b in picked.whole:
            parts[b].copy_(excess(self.blocks[b], levels[b]))
        return found


def as_array(values: Tensor) -> np.ndarray:
    """View a tensor on a CPU as an array. After `values.numpy()`, FSDP2 could no longer free the tensor's storage."""
    return np.from_dlpack(values)


def cell_size(n: int, limit: int = CELL) -> int:
    """Elements of the cells that n are cut into: a divisor of n, the limit or less if one is near, else more."""
    return _divisor_near(n, limit) if n else limit


@cache
def _divisor_near(n: int, limit: int) -> int:
    below = next(size for size in range(min(n, limit), 0, -1) if n % size == 0)
    return below if 8 * below >= min(n, limit) else next(size for size in range(limit, n + 1) if n % size == 0)


def _find_ends(cells: Tensor, high: Tensor, low: Tensor) -> None:
    """Find the largest and the smallest element of every cell; amax(|W|) would first build |W|."""
    for chunk, highs, lows in chunks_of(cells, high, low):
        torch.amax(chunk, dim=1, out=highs)
        torch.amin(chunk, dim=1, out=lows)


def _find_ends_above(cells: Tensor, high: Tensor, low: Tensor, level: float) -> None:
    """Find the ends of the cells from the first chunk on that has one above the level: those after it mostly do, too.

    Both ends of a chunk take one pass, and two thirds of the time of those of its cells.
    """
    above = False
    for each in chunks_of(cells, high, low):
        above = above or not max(magnitudes(as_array(each[0]))) <= level
        if above:
            _find_ends(*each)


def magnitudes(chunk: np.ndarray) -> tuple[float, float]:
    """Return the largest element, and the smallest with its sign turned.

    NumPy knows one thread alone, on which its two passes over what is cached take half the time of torch's one.
    """
    if torch.get_num_threads() > 1:
        low, high = torch.from_numpy(chunk).aminmax()
        return high.item(), -low.item()
    return chunk.max().item(), -chunk.min().item()


def arrays_of(group: Tensor) -> list[np.ndarray]:
    """View a vector on a CPU as arrays that stay in the cache."""
    array = as_array(group)
    return [array[start : start + CACHED] for start in range(0, len(array), CACHED)]


def chunks_of(cells: Tensor, *ends: Tensor) -> list[tuple[Tensor, ...]]:
    """Cut cells, and what belongs to each, where they leave the cache."""
    count = -(-cells.numel() // CACHED) if cells.is_cpu else 1
    return list(zip(*(part.chunk(count) for part in (cells, *ends)), strict=True)) if count > 1 else [(cells, *ends)]


def crowded(blocks: Sequence[Tensor], level: Tensor) -> list[bool]:
    """Tell which blocks are likely to be picked as a whole, from a sample of those that are one large group.

    On an accelerator, all are.
    """
    if not level.is_cpu:
        return [True] * len(blocks)
    groups = np.cumsum([0] + [len(block) for block in blocks])
    large = [b for b, block in enumerate(blocks) if len(block) == 1 and block.shape[1] >= 1 << 12]
    full = [False] * len(blocks)
    if large:
        samples = [sample_magnitudes(blocks[b], 8) for b in large]
        sizes = [len(sample) for sample in samples]
        above = np.concatenate(samples) > np.repeat(level.numpy()[groups[large]], sizes)
        counts = np.add.reduceat(above, np.cumsum([0, *sizes[:-1]]), dtype=np.int64)
        for b, count, size in zip(large, counts, sizes, strict=True):
            full[b] = bool(count * CELL > 0.5 * size)
    return full


def sample_magnitudes(block: Tensor, count: int) -> np.ndarray:
    """Take those in about so many cells all over a block of one group on a CPU: `(elements,)`.

    Single elements cost as much.
    """
    cells = as_array(block).reshape(-1, cell_size(block.shape[1]))
    return np.abs(cells[:: max(1, len(cells) // count)]).ravel()


def excess(block: Tensor, level: Tensor) -> Tensor:
    """Do what [`Cells.excess`] does for a whole block and the levels of its groups."""
    if block.is_cpu and len(block) == 1:
        return torch.tensor([excess_of_one(block, level.item())], dtype=torch.float64)
    results = torch.zeros(len(level), 2, dtype=torch.float64, device=block.device)
    for band, (piece,) in pieces(block):
        above = piece.abs().sub_(level[band, None]).relu_()
        results[band, 0] += above.sum(dim=1)
        results[band, 1] += above.sign_().sum(dim=1)
    return results


def excess_of_one(block: Tensor, level: float, compiled: bool = False) -> tuple[float, float]:
    """Do what [`excess`] does for a block of one group on a CPU.

    Args:
        block: `(1, elements)`.
        level: of the group.
        compiled: in one pass, fused with `torch.compile`, where that repays the call.
    """
    if not level < math.inf:  # of a broken weight
        return math.nan, math.nan
    if compiled and block.numel() > CPU_PIECE:
        rows = block.view(-1, cell_size(block.shape[1], 32 * CELL))
        total, count = fused(_row_excess)(rows, block.new_tensor(level)).sum(dim=1, dtype=torch.float64).tolist()
        return total, count
    total, count = 0.0, 0.0
    buffer, split = cached_pieces(block.view(-1))
    for piece in split:
        above = torch._C._nn.softshrink(piece, level, out=buffer[: len(piece)]).abs_()
        total += above.sum().item()
        count += above.sign_().sum().item()
    return total, count


def _row_excess(rows: Tensor, level: Tensor) -> Tensor:
    """Sum and count what stands above the level in each row: `(2, rows)`."""
    above = (rows.abs() - level).clamp_min(0)
    return torch.stack([above.sum(dim=1), above.sign().sum(dim=1)])


def cached_pieces(group: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Cut a vector on a CPU into pieces that stay in the cache, beside a buffer for what is computed from one."""
    size = min(len(group), CPU_PIECE * torch.get_num_threads())
    return group.new_empty(size), group.split(size)
