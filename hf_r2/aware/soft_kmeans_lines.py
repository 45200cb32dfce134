"""Functions that are a line in each of many bins, at all elements of a block."""

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_bins import MOST_BINS, LookUp, Scratch, tell_apart_, unsigned
from hf_r2.fusing import fused


class Lines:
    """Evaluates one function, or two of which one is multiplied, piece by piece."""

    def __init__(self) -> None:
        self._look_up, self._scratch = LookUp(), Scratch()

    def write(self, table: Tensor, target: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
        """Write `f(piece)`, or with a factor `factor · f(piece) + g(piece)`; all are `(rows, n)`.

        Args:
            table: constant and slope of each function in every bin, `(rows, bins, 2 or 4)`, float32.
            target: where to, of any dtype.
            numbers: of the elements' bins, as [`unsigned`] reads them.
            piece: the elements.
            *factor: none or one.
        """
        bins = table.shape[1]
        number = tell_apart_(unsigned(numbers, self._scratch, bins), bins)
        constant, slope, *second = self._look_up(table, number)
        if factor:
            first = torch.addcmul(constant, slope, piece, out=self._scratch("first", piece, torch.float32))
            constant = torch.addcmul(*second, piece, out=self._scratch("second", piece, torch.float32))
            slope, piece = first, factor[0]
        # Straight to its place in float32; other dtypes are rounded on the way
        if target.dtype == torch.float32:
            torch.addcmul(constant, slope, piece, out=target)
        else:
            target.copy_(torch.addcmul(constant, slope, piece))


class FusedLines:
    """The same in one pass without temporaries, by `torch.compile`."""

    def write(self, table: Tensor, target: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
        """See [`Lines.write`]."""
        rows, bins, _ = table.shape
        first = torch.arange(rows, dtype=torch.int32)[:, None] * bins
        fused(_write)(target, table.flatten(0, 1), first, numbers, piece, *factor)


def _write(target: Tensor, table: Tensor, first: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
    at = (numbers.int() & (MOST_BINS - 1)) + first
    value = table[at, 0] + table[at, 1] * piece
    if factor:
        value = value * factor[0] + (table[at, 2] + table[at, 3] * piece)
    target.copy_(value)
