"""Functions that are a line in each of many bins, at all elements of a block."""

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_bins import MOST_BINS, LookUp, unsigned
from hf_r2.fusing import fused


class Lines:
    """Evaluates one function, or two of which one is multiplied, piece by piece.

    Args:
        table: constant and slope of each function in every bin, `(rows, bins, 2 or 4)`, float32.
    """

    def __init__(self, table: Tensor) -> None:
        self._look_up = LookUp(table)

    def write(self, target: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
        """Write `f(piece)`, or with a factor `factor · f(piece) + g(piece)`; all are `(rows, n)`.

        Args:
            target: where to, of any dtype.
            numbers: of the elements' bins, as [`unsigned`] reads them.
            piece: the elements.
            *factor: none or one.
        """
        constant, slope, *second = self._look_up(unsigned(numbers, self._look_up.bins))
        if factor:
            constant, slope, piece = torch.addcmul(*second, piece), torch.addcmul(constant, slope, piece), factor[0]
        # Straight to its place in float32; other dtypes are rounded on the way
        if target.dtype == torch.float32:
            torch.addcmul(constant, slope, piece, out=target)
        else:
            target.copy_(torch.addcmul(constant, slope, piece))


class FusedLines:
    """The same in one pass without temporaries, by `torch.compile`."""

    def __init__(self, table: Tensor) -> None:
        rows, bins, _ = table.shape
        self._table = table.flatten(0, 1)
        self._first = torch.arange(rows, dtype=torch.int32)[:, None] * bins

    def write(self, target: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
        """See [`Lines.write`]."""
        fused(_write)(target, self._table, self._first, numbers, piece, *factor)


def _write(target: Tensor, table: Tensor, first: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
    at = (numbers.int() & (MOST_BINS - 1)) + first
    value = table[at, 0] + table[at, 1] * piece
    if factor:
        value = value * factor[0] + (table[at, 2] + table[at, 3] * piece)
    target.copy_(value)
