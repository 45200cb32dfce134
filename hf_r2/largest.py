"""The elements of largest magnitude in each group.

Where blocks on a CPU are one group each, their chunks are read once, and one is looked at again; elsewhere cells are,
or tiles.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.cells import CELL, Cells, PickedCells, arrays_of, magnitudes
from hf_r2.tiles import Tiles


class Found(NamedTuple):
    """Elements of one magnitude per group.

    Args:
        blocks: that they are of.
        level: the magnitudes, `(groups,)`.
        elements: some at a time, with their signs.
        whole: positions of the blocks that have many, or lie on a device, where the host would have to wait to learn
            how many they are.
    """

    blocks: Sequence[Tensor]
    level: Tensor
    elements: list[tuple[PickedCells, np.ndarray]]
    whole: list[int]

    def counts(self) -> Tensor:
        """Count them in each group, `(groups,)`, as floats."""
        counts = torch.zeros_like(self.level)
        for picked, _ in self.elements:
            counts += torch.from_numpy(np.bincount(picked.groups, minlength=len(counts)))
        parts = self._split(counts) if self.whole else []
        for b in self.whole:
            parts[b].copy_(self._in_block(b).sum(dim=1))
        return counts

    def add(self, grads: Sequence[Tensor], shares: Tensor) -> None:
        """Add share × sign(W) to them in blocks of the weight's layout, in place; shares `(groups,)`."""
        for picked, signs in self.elements:
            picked.add(grads, (signs * shares.numpy()[picked.groups])[:, None])
        of_blocks = self._split(shares) if self.whole else []
        for b in self.whole:
            grads[b].addcmul_(self.blocks[b].sign(), self._in_block(b) * of_blocks[b][:, None])

    def _in_block(self, b: int) -> Tensor:
        return self.blocks[b].abs() == self._split(self.level)[b][:, None]

    def _split(self, values: Tensor) -> list[Tensor]:
        return list(values.split([block.shape[0] for block in self.blocks]))


class FoundInTiles(NamedTuple):
    """The same, of a weight that kernels of their own work on."""

    tiles: Tiles
    level: Tensor
    of_tiles: Tensor
    of_groups: Tensor

    def counts(self) -> Tensor:
        """See [`Found.counts`]; of a group whose largest magnitude is not the level, that of its largest elements."""
        return self.of_groups

    def add(self, grads: Sequence[Tensor], shares: Tensor) -> None:
        """See [`Found.add`]."""
        self.tiles.add_largest(grads, self.of_tiles, self.level, shares)


class InTiles:
    """Search by kernels of their own."""

    def __init__(self, tiles: Tiles) -> None:
        self._tiles = tiles
        self._tops, self._counts, self._of_tiles = tiles.largest()

    def tops(self) -> Tensor:
        """See [`InChunks.tops`]."""
        return self._tops

    def find(self, level: Tensor) -> FoundInTiles:
        """See [`InChunks.find`]."""
        return FoundInTiles(self._tiles, level, self._of_tiles, self._counts)


class InChunks:
    """Search in blocks of one group each, on a CPU."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._chunks = [arrays_of(block.view(-1)) for block in blocks]
        self._ends = [[magnitudes(chunk) for chunk in chunks] for chunks in self._chunks]

    def tops(self) -> Tensor:
        """Largest magnitude of each group, `(groups,)`: NaN if an element is, 0 of none."""
        return self._blocks[0].new_tensor([_largest(ends) for ends in self._ends])

    def find(self, level: Tensor) -> Found:
        """Find the elements whose magnitude is the level of their group, `(groups,)`, not below the largest."""
        places, signs, whole = {}, [], []
        for b, top in enumerate(level.tolist()):
            found = self._positions(b, top)
            if found is None:
                whole.append(b)
            elif found:
                places[b] = torch.from_numpy(np.concatenate([positions for positions, _ in found]))
                signs += [np.full(len(positions), sign, level.numpy().dtype) for positions, sign in found]
        groups = np.repeat(list(places), [index.numel() for index in places.values()])
        elements = [(PickedCells(1, places, groups), np.concatenate(signs))] if places else []
        return Found(self._blocks, level, elements, whole)

    def _positions(self, b: int, top: float) -> list[tuple[np.ndarray, float]] | None:
        """Find where a block has a magnitude, in order of the chunks, and with which sign; None if in many places."""
        found, start, count = [], 0, 0
        for chunk, ends in zip(self._chunks[b], self._ends[b], strict=True):
            for value in {sign * top for sign, end in zip((1, -1), ends, strict=True) if end == top}:
                positions = np.flatnonzero(chunk == value) + start
                found.append((positions, np.sign(value)))
                count += len(positions)
            if count * CELL > self._blocks[b].numel() + CELL:
                return None
            start += len(chunk)
        return found


class InCells:
    """Search in any blocks."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._cells = Cells(blocks)

    def tops(self) -> Tensor:
        """See [`InChunks.tops`]."""
        return self._cells.tops()

    def find(self, level: Tensor) -> Found:
        """See [`InChunks.find`]."""
        picked = self._cells.pick(level)
        elements = []
        for batch in picked.cells:
            values = batch.of(self._cells.blocks)
            found = np.abs(values) == level.numpy()[batch.groups, None]
            elements.append((batch.only(found), np.sign(values[found])))
        return Found(self._cells.blocks, level, elements, picked.whole)


def search_largest(blocks: Sequence[Tensor], tiles: Tiles | None = None) -> InTiles | InChunks | InCells:
    """Read contiguous blocks `(groups, elements)`, float32 or float64, or what has been cut into tiles."""
    if tiles is not None:
        return InTiles(tiles)
    single = blocks[0].is_cpu and all(block.shape[0] == 1 for block in blocks)
    return InChunks(blocks) if single else InCells(blocks)


def _largest(ends: list[tuple[float, float]]) -> float:
    if math.isnan(sum(map(sum, ends))):  # of which max would take no notice
        return math.nan
    return max(map(max, ends), default=0.0)
