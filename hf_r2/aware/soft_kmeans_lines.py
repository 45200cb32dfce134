"""Tables for long rows: functions that are a line in each of many bins narrower than the nodes are apart.

What an element counts for at the nodes is a cubic function of its place. Around each bin's middle it is continued to
second order in the distance, and what lies off the middle is taken to lie where the bin's mean does: spikes stay in
their places.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_bins import (
    COUNTED_PIECE,
    CROWD,
    MOST_BINS,
    Bins,
    LookUp,
    Scratch,
    bands_of,
    piece_size,
    tell_apart_,
    unsigned,
)
from hf_r2.aware.soft_kmeans_interpolation import add_to_nodes, around_cells, cubic_shares, node_numbers
from hf_r2.aware.soft_kmeans_nodes import Nodes
from hf_r2.aware.soft_kmeans_steps import Scaled, Step
from hf_r2.fusing import fused

BINS_PER_NODE = 8

_MANY = 1 << 18
"""Of this many elements, where in its bin each lies averages out in sums."""

_SPIKE = 1 / 1024
"""Share of a row's elements: more in one bin may be a spike, whose place in it matters."""


class LineTable(NamedTuple):
    """What the passes over all elements of a block need.

    Args:
        index: the number of each element's bin, see [`Bins.assign`].
        bins: of all groups.
        offsets: of the bins' means from their middles, in bins, `(groups, bins)`.
        crowded: whether sums over a bin are taken in float64.
        nodes: `BINS_PER_NODE` bins apart, see [`to_nodes`].
        steps: the iterations.
    """

    index: Tensor | None
    bins: Bins
    offsets: Tensor | None
    crowded: bool
    nodes: Nodes
    steps: list[Step]

    @classmethod
    def run(cls, block: Tensor, start: Tensor, scaled: Scaled, low: Tensor, high: Tensor, count: int) -> "LineTable":
        """Cut the elements of a block into a number of bins and run soft k-means on them; see [`tabulate`]."""
        bins = Bins.of(low, high, count)
        index, offsets = (
            torch.empty(block.shape, dtype=torch.int16),
            torch.empty(len(block), count, dtype=torch.float32),
        )
        points = scaled.inward(_node_values(bins)).to(scaled.arithmetic(block))
        weights, crowded, few = torch.empty_like(points), False, block.shape[1] < _MANY
        for rows, pieces in bands_of(block, index, size=COUNTED_PIECE):
            own, parts = bins.of_groups(rows), list(pieces)
            counts, moments = own.assign(parts, moments=few)
            most = counts.max().item() / block.shape[1]
            if not few and most > _SPIKE:
                counts, moments = own.assign(parts, moments=True)
            torch.div(moments, counts.clamp_min(1), out=offsets[rows])
            weights[rows] = to_nodes(counts, moments, offsets[rows])
            crowded = crowded or most > CROWD
        nodes = Nodes(points, weights, scaled)
        return cls(index, bins, offsets, crowded, nodes, nodes.iterate(start))

    @property
    def large(self) -> tuple[Tensor, ...]:
        """The tensors that autograd should hold, and free."""
        return self.index, self.offsets

    def holding(self, index: Tensor | None, offsets: Tensor | None) -> "LineTable":
        """Return the same with these in the places of [`large`]."""
        return self._replace(index=index, offsets=offsets)

    def node_sums(self, block: Tensor, grad: Tensor) -> Tensor:
        """Sum the output's gradient over what the nodes stand for; see [`to_nodes`]."""
        few, dtype = block.shape[1] < _MANY, torch.float64 if self.crowded else torch.float32
        result = torch.empty_like(self.nodes.points)
        for rows, pieces in bands_of(block, self.index, grad, size=COUNTED_PIECE):
            sums, moments = self.bins.of_groups(rows).sums(pieces, dtype, moments=few)
            offsets = self.offsets[rows]
            result[rows] = to_nodes(sums.float(), (moments if few else offsets * sums).float(), offsets)
        return result

    def write(self, target: Tensor, values: Tensor, compiled: bool, block: Tensor, *factor: Tensor) -> None:
        """Write `f(block)`, or with a factor `factor · f(block) + g(block)`.

        Args:
            target: where to, of any dtype.
            values: of the functions at the nodes, `(groups, 1 or 2, nodes)`.
            compiled: in one pass, fused by `torch.compile`.
            block: the elements.
            *factor: none or one.
        """
        write, size = write_fused if compiled else Lines().write, piece_size(block.shape[1] if compiled else 0)
        for rows, pieces in bands_of(target, self.index, block, *factor, size=size):
            table = _lines(values[rows], self.bins.of_groups(rows))
            for piece in pieces:
                write(table, *piece)


def _node_values(bins: Bins) -> Tensor:
    """Where the nodes lie, `(groups, 1, nodes)` in float64; see [`to_nodes`]."""
    number = node_numbers(bins.count // BINS_PER_NODE) * BINS_PER_NODE
    return (bins.low.double() + (number + 0.5) / bins.per_unit.double())[:, None]


def to_nodes(values: Tensor, moments: Tensor, offsets: Tensor) -> Tensor:
    """Distribute values of bins to nodes `BINS_PER_NODE` bins apart, as cubic interpolation between them does.

    Shares of the nodes are continued around each bin's middle to second order in the distance, and what lies off the
    middle is taken to lie where the bin's mean does: then spikes stay in their places.

    Args:
        values: sums over the elements of the bins, `(groups, bins)`, float32.
        moments: sums of what was summed times the distances from the bins' middles, in bins.
        offsets: of the bins' means, see [`LineTable`].

    Returns:
        Values of the nodes, `(groups, 1, nodes)`, float32.
    """
    groups, bins = values.shape
    cells = bins // BINS_PER_NODE
    spread = torch.zeros(groups * cells, 4, dtype=torch.float32)
    for term, share in zip((values, moments, moments * offsets), _cubic_terms(), strict=True):
        spread.addmm_(term.view(-1, BINS_PER_NODE), share)
    return add_to_nodes(spread.view(groups, cells, 4).permute(2, 0, 1))


@cache
def _cubic_terms() -> Tensor:
    """Shares of the four nodes around a bin in a value there, cubic, as a Taylor polynomial of second order.

    Returns:
        Coefficients of the distance from the bin's middle, in bins, to the power 0, 1 and 2, for the bins between two
        nodes: `(powers, bins, 4)`.
    """
    t = torch.arange(BINS_PER_NODE, dtype=torch.float32, device="cpu") / BINS_PER_NODE
    one, zero = torch.ones_like(t), torch.zeros_like(t)
    derivatives = [[one, t, t * t, t**3], [zero, one, 2 * t, 3 * t * t], [zero, zero, 2 * one, 6 * t]]
    factors = 1, 1 / BINS_PER_NODE, 1 / (2 * BINS_PER_NODE**2)
    terms = [torch.stack(powers, dim=1) * factor for powers, factor in zip(derivatives, factors, strict=True)]
    return torch.stack(terms) @ cubic_shares()


def _lines(values: Tensor, bins: Bins) -> Tensor:
    """Interpolate functions between the nodes by a line in each bin.

    Args:
        values: of m functions at the nodes, `(groups, m, nodes)`.
        bins: of these groups.

    Returns:
        Constant and slope of every function in every bin, `(groups, bins, 2 m)`, float32.
    """
    groups, functions = values.shape[:2]
    around = around_cells(values.float()).transpose(1, 2).reshape(-1, 4 * functions)
    lines = (around @ _line_terms(functions)).view(groups, bins.count, functions, 2)
    slopes = lines[..., 1].mul_(bins.per_unit[..., None])
    lines[..., 0].addcmul_(slopes, bins.middles()[..., None], value=-1)
    return lines.flatten(2)


@cache
def _line_terms(functions: int) -> Tensor:
    """Find what takes functions at the four nodes around a cell to values and slopes, per bin, amid its bins.

    Returns:
        `(4 · functions, bins · functions · 2)` for the bins between two nodes.
    """
    terms = _cubic_terms()[:2].permute(2, 1, 0)  # nodes, bins, value and slope
    separate = torch.eye(functions, dtype=torch.float32, device="cpu")[:, None, None, :, None] * terms[None, :, :, None]
    return separate.reshape(4 * functions, -1)


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


def write_fused(table: Tensor, target: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
    """Do what [`Lines.write`] does in one pass without temporaries, by `torch.compile`."""
    rows, bins, _ = table.shape
    first = torch.arange(rows, dtype=torch.int32)[:, None] * bins
    fused(_write)(target, table.flatten(0, 1), first, numbers, piece, *factor)


def _write(target: Tensor, table: Tensor, first: Tensor, numbers: Tensor, piece: Tensor, *factor: Tensor) -> None:
    at = (numbers.int() & (MOST_BINS - 1)) + first
    value = table[at, 0] + table[at, 1] * piece
    if factor:
        value = value * factor[0] + (table[at, 2] + table[at, 3] * piece)
    target.copy_(value)
