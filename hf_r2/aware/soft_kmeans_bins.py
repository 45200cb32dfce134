"""Bins of equal width for the elements of a block: which bin holds each element, and sums over the elements of bins.

Passes go over a block in bands of groups, and over a band in pieces. What is computed from one piece is written over
what was computed from the one before: to get new pages of memory takes longer than the arithmetic.
"""

from collections.abc import Iterable, Iterator
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

MOST_BINS = 1 << 16
"""What a 16-bit number tells apart."""

CROWD = 1 / 64
"""Share of a row's elements: over more in one bin, a float32 sum would lose digits."""

_PIECE, COUNTED_PIECE = 1 << 15, 1 << 17
"""Elements of a piece: what repays the calls, and stays near a core with what is looked up for it. Counting looks up
nothing, and starts with a histogram of all bins: it takes more."""


class Scratch:
    """Memory for what is computed from a piece, by name."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def __call__(self, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a tensor of the shape of another, with anything in it; always of one dtype for a name."""
        held = self._held.get(name)
        if held is None or held.shape != like.shape:
            held = self._held[name] = torch.empty(like.shape, dtype=dtype)
        return held


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

    def place(self, piece: Tensor, scratch: Scratch) -> Tensor:
        """Return how many bins lie below each element, in float32."""
        return torch.sub(piece, self.low, out=scratch("place", piece, torch.float32)).mul_(self.per_unit)

    def of_groups(self, groups: slice) -> "Bins":
        """Return those of some groups."""
        return Bins(self.low[groups], self.per_unit[groups], self.count)

    def middles(self) -> Tensor:
        """Middles of the bins, `(groups, bins)` in float32."""
        return self.low + (torch.arange(self.count, dtype=torch.float32) + 0.5) / self.per_unit

    def assign(self, pieces: Iterable[tuple[Tensor, Tensor]], moments: bool) -> tuple[Tensor, Tensor]:
        """Write the number of every element's bin, as [`unsigned`] reads it.

        Args:
            pieces: of the elements, and of where to write to, int16; see [`bands_of`].
            moments: whether to sum distances, too.

        Returns:
            How many elements each bin holds, and the sums of their distances from its middle, in bins, or zeros;
            `(groups, bins)`, float32.
        """
        counts, firsts = torch.zeros(2, len(self.low), self.count, dtype=torch.float32).unbind()
        scratch = Scratch()
        for piece, target in pieces:
            place = self.place(piece, scratch)
            number = scratch("number", piece, torch.int32).copy_(place)
            target.copy_(number)
            tell_apart_(number, self.count)
            counts += histogram(number, None, self.count)
            if moments:
                firsts += histogram(number, place.frac_(), self.count)
        return counts, firsts.sub_(counts, alpha=0.5) if moments else firsts

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
        scratch = Scratch()
        for piece, numbers, part in pieces:
            number = tell_apart_(unsigned(numbers, scratch, self.count), self.count)
            part = part if part.dtype == dtype else scratch("part", part, dtype).copy_(part)
            sums += histogram(number, part, self.count)
            if moments:
                distances = self.place(piece, scratch).frac_().sub_(0.5)
                weights = torch.mul(distances, part, out=scratch("weights", part, dtype))
                firsts += histogram(number, weights, self.count)
        return sums, firsts if moments else None

    def powers(self, pieces: Iterable[tuple[Tensor, ...]], dtype: torch.dtype) -> Tensor:
        """Sum the powers 0 to 3 of the elements' places in their bins, or values times these.

        Args:
            pieces: of the elements, and of values if any.
            dtype: in which sums are taken.

        Returns:
            `(4, groups, bins)`; a place is 0 at the lower end of its bin and 1 at the higher one.
        """
        result, scratch = torch.zeros(4, len(self.low), self.count, dtype=dtype), Scratch()
        for piece, *values in pieces:
            place = self.place(piece, scratch)
            number = tell_apart_(scratch("number", piece, torch.int32).copy_(place), self.count)
            place = scratch("in bin", piece, dtype).copy_(place.frac_())
            weights = scratch("weights", piece, dtype).copy_(*values) if values else None
            for sums in result:
                sums += histogram(number, weights, self.count)
                weights = scratch("weights", piece, dtype).copy_(place) if weights is None else weights.mul_(place)
        return result


def piece_size(least: int = 0) -> int:
    """Elements of a piece that something is looked up for, by all threads; or as many as it must have."""
    return max(least, min(_PIECE * torch.get_num_threads(), COUNTED_PIECE))


def bands_of(*parts: Tensor, size: int) -> Iterator[tuple[slice, Iterator[tuple[Tensor, ...]]]]:
    """Walk over blocks of one shape together, in bands of as many groups as make a piece, or of single groups.

    Args:
        *parts: the blocks.
        size: elements of a piece, at most if a group has as many.

    Yields:
        The slice of the groups, and an iterator over pieces of their columns: one view for each block.
    """
    groups, n = parts[0].shape
    rows = max(1, size // n)
    for band in (slice(first, first + rows) for first in range(0, groups, rows)):
        yield band, zip(*(part[band].split(size, dim=1) for part in parts), strict=True)


def unsigned(numbers: Tensor, scratch: Scratch, count: int = MOST_BINS) -> Tensor:
    """Read 16-bit numbers below a count as unsigned ones, int32: all indexing knows."""
    number = scratch("number", numbers, torch.int32).copy_(numbers)
    return number.bitwise_and_(MOST_BINS - 1) if count > MOST_BINS // 2 else number


def tell_apart_(number: Tensor, bins: int) -> Tensor:
    """Count the bins of all rows through, in numbers of bins `(rows, n)`, int32."""
    if len(number) > 1:
        number += torch.arange(len(number), dtype=torch.int32)[:, None] * bins
    return number


def histogram(number: Tensor, weights: Tensor | None, bins: int) -> Tensor:
    """Count, or sum weights, by numbers of bins `(rows, n)` that are told apart: `(rows, bins)`."""
    weights = None if weights is None else weights.reshape(-1)
    return torch.bincount(number.view(-1), weights, minlength=len(number) * bins).view(len(number), bins)


class LookUp:
    """Looks up all columns of a table at once, as one wide number."""

    _WIDE: ClassVar = {2: torch.int64, 4: torch.complex128}

    def __init__(self) -> None:
        self._found = torch.empty(0)
        self._columns: tuple[Tensor, ...] = ()

    def __call__(self, table: Tensor, number: Tensor) -> tuple[Tensor, ...]:
        """Return what each column holds, until the next look-up.

        Args:
            table: `(rows, bins, 2 or 4)`, float32.
            number: of bins, told apart, `(rows, n)`.

        Returns:
            A strided tensor `(rows, n)` for each column.
        """
        wide = self._WIDE[table.shape[2]]
        if not self._columns or self._columns[0].shape != number.shape:
            self._found = torch.empty(number.numel(), dtype=wide)
            self._columns = self._found.view(torch.float32).view(*number.shape, -1).unbind(-1)
        torch.index_select(table.view(-1).view(wide), 0, number.view(-1), out=self._found)
        return self._columns
