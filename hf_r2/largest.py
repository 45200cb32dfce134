"""The elements of largest magnitude in each group.

Where blocks on a CPU are one group each, their chunks are read once, and one is looked at again; elsewhere cells are.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.cells import CELL, Cells, PickedCells, as_array, chunks_of, magnitudes


class Found(NamedTuple):
    """Elements of one magnitude per group.

    Args:
        elements: some at a time, with their signs.
        whole: positions of the blocks that have many, or lie on an accelerator, where the host would have to wait to
            learn how many they are.
    """

    elements: list[tuple[PickedCells, np.ndarray]]
    whole: list[int]


class InChunks:
    """Search in blocks of one group each, on a CPU."""

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = blocks
        self._chunks = [[chunk for (chunk,) in chunks_of(block.view(-1))] if block.numel() else [] for block in blocks]
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
        return Found([(PickedCells(1, places, groups), np.concatenate(signs))] if places else [], whole)

    def _positions(self, b: int, top: float) -> list[tuple[np.ndarray, float]] | None:
        """Find where a block has a magnitude, in order of the chunks, and with which sign; None if in many places."""
        found, start, count = [], 0, 0
        for chunk, ends in zip(self._chunks[b], self._ends[b], strict=True):
            for value in {sign * top for sign, end in zip((1, -1), ends, strict=True) if end == top}:
                positions = np.flatnonzero(as_array(chunk) == value) + start
                found.append((positions, np.sign(value)))
                count += len(positions)
            if count * CELL > self._blocks[b].numel() + CELL:
                return None
            start += chunk.shape[0]
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
        return Found(elements, picked.whole)


def search_largest(blocks: Sequence[Tensor]) -> InChunks | InCells:
    """Read contiguous blocks `(groups, elements)`, float32 or float64."""
    single = blocks[0].is_cpu and all(block.shape[0] == 1 for block in blocks)
    return InChunks(blocks) if single else InCells(blocks)


def _largest(ends: list[tuple[float, float]]) -> float:
    if math.isnan(sum(map(sum, ends))):  # of which max would take no notice
        return math.nan
    return max(map(max, ends), default=0.0)
