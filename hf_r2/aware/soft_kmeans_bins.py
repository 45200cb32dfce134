"""Bins of equal width for the elements of a block: which bin holds each element, and sums over the elements of bins.

Passes go over a block in bands of groups, and over a band in pieces.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

MOST_BINS = 1 << 16
"""What a 16-bit number tells apart."""

_PIECES = 20
"""A pass works on at most this share, 1 / 20, of a block at a time, so that its temporaries are small beside it."""

_LEAST_PIECE, MOST_PIECE = 1 << 15, 1 << 17
"""Elements of a piece: what repays the calls, and what stays near a core. Counting builds little, and starts with a
histogram of all bins: it takes the most."""


class Bins(NamedTuple):
    """Bins of equal width for the elements of every row of a block.

    Args:
        low: lower end of the first one, `(groups, 1)`, float32.
        per_unit: bins per unit, `(groups, 1)`, float32.
        count: of every row.
    """

    low: Tensor
    per_unit: Tensor
    count: int

    @classmethod
    def of(cls, low: Tensor, high: Tensor, count: int) -> "Bins":
        """Make the first and the last bin's middle the smallest and the largest element."""
        per_unit = ((count - 1) / (high.double() - low.double())).float()
        return cls((low.double() - 0.5 / per_unit.double()).float(), per_unit, count)

    def place(self, piece: Tensor) -> Tensor:
        """Return how many bins lie below each element."""
        return (piece - self.low).mul_(self.per_unit)

    def of_groups(self, groups: slice) -> "Bins":
        """Return those of some groups."""
        return Bins(self.low[groups], self.per_unit[groups], self.count)

    def middles(self) -> Tensor:
        """Middles of the bins, `(groups, bins)` in float32."""
        return self.low + (torch.arange(self.count) + 0.5) / self.per_unit

    def assign(self, pieces: Iterable[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Write the number of every element's bin, as [`unsigned`] reads it.

        Args:
            pieces: of the elements, and of where to write to, int16; see [`bands_of`].

        Returns:
            How many elements each bin holds, and the sums of their distances from its middle, in bins;
            `(groups, bins)`, float32.
        """
        counts, moments = torch.zeros(2, len(self.low), self.count).unbind()
        for piece, target in pieces:
            place = self.place(piece)
            number = place.int()
            target.copy_(number)
            counts += histogram(number, None, self.count)
            moments += histogram(number, place.frac_(), self.count)
        return counts, moments.sub_(counts, alpha=0.5)

    def sums(
        self, pieces: Iterable[tuple[Tensor, ...]], dtype: torch.dtype, moments: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Sum values over the elements of every bin, and on request values times distances from its middle, in bins.

        Args:
            pieces: of the elements, the numbers of their bins, and the values.
            dtype: in which sums are taken.
            moments: whether to sum values times distances.

        Returns:
            Sums `(groups, bins)` of the dtype.
        """
        sums, firsts = torch.zeros(2, len(self.low), self.count, dtype=dtype).unbind()
        for piece, numbers, part in pieces:
            number, part = unsigned(numbers, self.count), part.to(dtype)
            sums += histogram(number, part, self.count)
            if moments:
                firsts += histogram(number, self.place(piece).frac_().sub_(0.5) * part, self.count)
        return sums, firsts if moments else None


def bands_of(
    *parts: Tensor, least: int = _LEAST_PIECE, whole: bool = False
) -> Iterator[tuple[slice, Iterator[tuple[Tensor, ...]]]]:
    """Walk over blocks of one shape together, in bands of as many groups as make a piece, or of single groups.

    Yields:
        The slice of the groups, and an iterator over pieces of their columns, or one of all if they are to be whole:
        one view for each block.
    """
    groups, n = parts[0].shape
    size = min(MOST_PIECE, max(least, groups * n // _PIECES))
    rows = max(1, size // n)
    for band in (slice(first, first + rows) for first in range(0, groups, rows)):
        yield band, zip(*(part[band].split(n if whole else size, dim=1) for part in parts), strict=True)


def unsigned(numbers: Tensor, count: int = MOST_BINS) -> Tensor:
    """Read 16-bit numbers below a count as unsigned ones, int32: all indexing knows."""
    return numbers.int().bitwise_and_(MOST_BINS - 1) if count > MOST_BINS // 2 else numbers.int()


def histogram(number: Tensor, weights: Tensor | None, bins: int) -> Tensor:
    """Count, or sum weights, by numbers of bins `(rows, n)`: `(rows, bins)`."""
    weights = None if weights is None else weights.reshape(-1)
    return torch.bincount(_own(number, bins), weights, minlength=len(number) * bins).view(len(number), bins)


class LookUp:
    """Looks up all columns of a table at once, as one wide number.

    Args:
        table: `(rows, bins, 2 or 4)`, float32.
    """

    def __init__(self, table: Tensor) -> None:
        self.bins, columns = table.shape[1:]
        self._table = table.view(-1).view({2: torch.int64, 4: torch.complex128}[columns])

    def __call__(self, number: Tensor) -> tuple[Tensor, ...]:
        """Return what each column holds for numbers of bins `(rows, n)`, strided, of their shape."""
        found = self._table.index_select(0, _own(number, self.bins))
        return found.view(torch.float32).view(*number.shape, -1).unbind(-1)


def _own(number: Tensor, bins: int) -> Tensor:
    """Tell the bins of different rows apart, `(rows · n,)`."""
    if len(number) > 1:
        number = number + torch.arange(len(number), dtype=torch.int32)[:, None] * bins
    return number.reshape(-1)
