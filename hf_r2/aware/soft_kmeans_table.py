"""Soft k-means of scalars by tables.

The soft weight is a smooth function of the weight, so it is computed in the middle of many narrow bins and continued
linearly within each: one look-up per element, for any number of clusters and iterations. The iterations themselves run
on few nodes, which carry the elements' counts as cubic interpolation does: sums over the nodes are sums over all
elements of the interpolated function.
"""

import math
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_nodes import Nodes, output_at
from hf_r2.aware.soft_kmeans_steps import Scaled, Step

LEAST_BINS, MOST_BINS = 1 << 12, 1 << 16
"""The least are for values that stand for all others of their bin; rows that are short make do with fewer."""

_BIN = 0.025
"""By how much a logit may change within a bin: linear continuation then leaves gradients four correct digits."""

_BINS_PER_NODE = 8

_ELEMENTS_PER_BIN = {"few": 4, "many": 2}
"""With fewer, passes over all elements cost no more than the tables; with many clusters, from 8 on, they cost more."""

_MANY = 1 << 18
"""Of this many elements, where in its bin each lies averages out in sums of the output's gradient."""

_CROWD = 64
"""A bin is crowded with more than this share, 1 / 64, of the elements."""

_BAND = 1 << 16
"""Bins, groups × bins, that are worked on at a time."""

_PIECES = 32
"""A pass works on at most this share, 1 / 32, of a block at a time, so that its temporaries are small beside it."""

_LEAST_PIECE, MOST_PIECE = 1 << 15, 1 << 17
"""Elements of a piece: what repays the calls, and what stays in a core's cache. Counting builds little, and starts with
a histogram of all bins: it takes the most."""


class Bins(NamedTuple):
    """Bins of equal width for the elements of every row of a block.

    Args:
        low: lower end of the first one, `(groups, 1)`, dtype of the arithmetic.
        per_unit: bins per unit, `(groups, 1)`.
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

    def place(self, piece: Tensor, groups: slice) -> Tensor:
        """Return how many bins lie below each element of some groups."""
        return (piece - self.low[groups]).mul_(self.per_unit[groups])

    def of_groups(self, groups: slice) -> "Bins":
        """Return those of some groups."""
        return Bins(self.low[groups], self.per_unit[groups], self.count)

    def middles(self) -> Tensor:
        """Middles of the bins, `(groups, bins)` in float32."""
        return self.low + (torch.arange(self.count) + 0.5) / self.per_unit

    def nodes(self) -> Tensor:
        """Nodes, `(groups, 1, nodes)` in float64; see [`to_nodes`]."""
        number = torch.arange(-2, self.count // _BINS_PER_NODE + 2) * _BINS_PER_NODE
        return (self.low.double() + (number + 0.5) / self.per_unit.double())[:, None]


class Band(NamedTuple):
    """Groups of a block whose tables are worked on together.

    Args:
        groups: which.
        bins: theirs.
        offsets: of the bins' means from their middles, in bins, `(groups, bins)`.
        crowded: whether a bin holds so many elements of its row that a float32 sum over them would lose digits.
        nodes: see [`to_nodes`].
        steps: the iterations.
    """

    groups: slice
    bins: Bins
    offsets: Tensor
    crowded: bool
    nodes: Nodes
    steps: list[Step]


class Table(NamedTuple):
    """What the passes over all elements of a block need.

    Args:
        index: of each element's bin among those of its band, int32, shape of the block.
        bands: all groups.
    """

    index: Tensor
    bands: list[Band]


def to_nodes(values: Tensor, moments: Tensor, offsets: Tensor) -> Tensor:
    """Distribute values of bins to nodes `_BINS_PER_NODE` bins apart, as cubic interpolation between them does.

    Shares of the nodes are continued around each bin's middle to second order in the distance, and what lies off the
    middle is taken to lie where the bin's mean does: then spikes stay in their places.

    Args:
        values: sums over the elements of the bins, `(groups, bins)`, float32.
        moments: sums of what was summed times the distances from the bins' middles, in bins.
        offsets: of the bins' means, see [`Band`].

    Returns:
        Values of the nodes, `(groups, 1, nodes)`, float32; the first of them lies two before the first bin.
    """
    groups, bins = values.shape
    cells = bins // _BINS_PER_NODE
    terms = values, moments, moments * offsets
    spread = sum(term.view(groups, cells, -1) @ share for term, share in zip(terms, _cubic_terms(), strict=True))
    result = values.new_zeros(groups, 1, cells + 4)
    for number in range(4):
        result[:, 0, number + 1 : number + 1 + cells] += spread[..., number]
    return result


@cache
def _cubic_terms() -> tuple[Tensor, ...]:
    """Shares of the four nodes around a bin in a value there, cubic, as a Taylor polynomial of second order.

    Returns:
        Coefficients of the distance from the bin's middle, in bins, to the power 0, 1 and 2, `(bins, 4)` each for the
        bins between two nodes.
    """
    t = torch.arange(_BINS_PER_NODE, device="cpu") / _BINS_PER_NODE
    before, after, second = t + 1, t - 1, t - 2
    shares = [t * after * second / -6, before * after * second / 2, before * t * second / -2, before * t * after / 6]
    slopes = [
        (3 * t * t - 6 * t + 2) / -6,
        (3 * t * t - 4 * t - 1) / 2,
        (3 * t * t - 2 * t - 2) / -2,
        t * t / 2 - 1 / 6,
    ]
    bends = [1 - t, 3 * t - 2, 1 - 3 * t, t]
    scales = 1, 1 / _BINS_PER_NODE, 1 / (2 * _BINS_PER_NODE**2)
    return tuple(torch.stack(term, dim=1) * scale for term, scale in zip((shares, slopes, bends), scales, strict=True))


def to_middles(values: Tensor) -> Tensor:
    """Interpolate values at the nodes `(groups, 1, nodes)` to the bins' middles `(groups, bins)`, in float32."""
    return (values[:, 0].float().unfold(1, 4, 1)[:, 1:] @ _cubic_terms()[0].T).flatten(1)


class TableSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by a table that [`tabulate`] made."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, table: Table, implicit: bool) -> Tensor:
        """Look up f, continued linearly by f′."""
        output = torch.empty(block.shape, dtype=block.dtype)
        slopes = []
        for band in table.bands:
            pairs, own = _output_table(band)
            slopes.append(own)
            parts = (each[band.groups] for each in (block, table.index, output))
            for _, (piece, index, target) in pieces_of(*parts):
                found = look_up(pairs, index)
                _write(target, found[..., 0], found[..., 1], piece)
        # The index and f′ are saved as tensors, so that autograd can free them
        ctx.bands, ctx.implicit = table.bands, implicit
        ctx.save_for_backward(block, table.index, *slopes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Look up f′ and q, both continued linearly."""
        block, index, *slopes = ctx.saved_tensors
        result = torch.empty(block.shape, dtype=block.dtype)
        for band, slope in zip(ctx.bands, slopes, strict=True):
            parts = [each[band.groups] for each in (block, index, grad, result)]
            quads = _gradient_table(band, slope, *parts[:3], ctx.implicit)
            for _, (piece, where, part, target) in pieces_of(*parts):
                found = look_up(quads, where)
                own, through = (torch.addcmul(found[..., at], found[..., at + 1], piece) for at in (0, 2))
                _write(target, through, own, part)
        return result, None, None


def tabulate(block: Tensor, start: Tensor, scaled: Scaled) -> Table | None:
    """Cut the elements of a block `(groups, n)` on a CPU into bins and run soft k-means on them.

    Args:
        block: float16, bfloat16 or float32.
        start: centroids `(groups, k, 1)` in scaled units, float64.
        scaled: units, temperature and stop rule.

    Returns:
        The table; None where bins would be too many or too wide, and [`ExactSoftKMeans`] should do it instead.
    """
    low, high = block.amin(dim=1, keepdim=True).float(), block.amax(dim=1, keepdim=True).float()
    reach, largest = high.double() - low.double(), torch.maximum(low.abs(), high.abs()).double()
    # Values far from zero, compared with their spread, would lose their last digits in a linear continuation
    if not bool(((reach > largest / 2) & (reach > 1e-30) & (largest < 1e30)).all()):
        return None
    wanted = _bins_for([Step(start, start, start, None)], reach, scaled)
    enough = block.shape[1] // _ELEMENTS_PER_BIN["few" if start.shape[1] < 8 else "many"]
    most = min(MOST_BINS, _whole_cells(enough))
    while 0 < most >= wanted:
        # Centroids may drift apart: bins to spare cost less than a second run
        count = min(max(_whole_cells(wanted * 9 / 8), LEAST_BINS), most)
        table = _run(block, start, scaled, Bins.of(low, high, count))
        wanted = max(_bins_for(band.steps, reach[band.groups], scaled.of(band.groups)) for band in table.bands)
        if wanted <= count:
            return table
    return None


def _bins_for(steps: list[Step], reach: Tensor, scaled: Scaled) -> int:
    """Count the bins that resolve the attention of all steps over the reach of the elements."""
    centroids = torch.stack([step.old[..., 0] for step in steps]).sort(dim=2).values
    temperature = scaled.temperature[:, 0]
    gap = centroids.diff(dim=2, prepend=centroids[..., :1]).amax(dim=(0, 2))[:, None]
    span = (centroids[..., -1] - centroids[..., 0]).amax(dim=0)[:, None]
    # A logit changes fastest between neighbours far apart, or across as many as share one temperature
    slope = torch.maximum(2 * gap / temperature, torch.minimum(2 * span / temperature, 2 / temperature.sqrt()))
    bins = float((reach / scaled.scale[:, 0] * slope).max()) / _BIN
    return _whole_cells(bins + _BINS_PER_NODE) if bins else 0


def _whole_cells(bins: float) -> int:
    return _BINS_PER_NODE * math.floor(bins / _BINS_PER_NODE)


def _run(block: Tensor, start: Tensor, scaled: Scaled, bins: Bins) -> Table:
    index = torch.empty(block.shape, dtype=torch.int32)
    size = max(1, _BAND // bins.count)
    bands = []
    for groups in (slice(first, first + size) for first in range(0, len(block), size)):
        own, units, part = bins.of_groups(groups), scaled.of(groups), block[groups]
        counts, moments = _assign(part, own, index[groups])
        offsets = moments / counts.clamp_min(1)
        points = units.inward(own.nodes()).to(scaled.arithmetic(block))
        nodes = Nodes(points, to_nodes(counts.float(), moments, offsets), units)
        crowded = bool((counts > block.shape[1] / _CROWD).any())
        bands.append(Band(groups, own, offsets, crowded, nodes, nodes.iterate(start[groups])))
    return Table(index, bands)


def _assign(block: Tensor, bins: Bins, index: Tensor) -> tuple[Tensor, Tensor]:
    """Write the index of each element's bin, return numbers of elements in the bins and their first moments."""
    counts = torch.zeros(len(block), bins.count, dtype=torch.int64)
    sums = torch.zeros(counts.shape)
    for rows, (piece, target) in pieces_of(block, index, least=MOST_PIECE):
        place = bins.place(piece, rows)
        target.copy_(place)
        place.frac_()
        if len(block) > 1:
            target += torch.arange(len(block), dtype=torch.int32)[rows, None] * bins.count
        counts[rows] += _histogram(target, None, rows, bins.count)
        sums[rows] += _histogram(target, place, rows, bins.count)
    return counts, sums - 0.5 * counts


def _histogram(index: Tensor, weights: Tensor | None, rows: slice, bins: int) -> Tensor:
    """Count, or sum weights, over the bins of some rows of a band: `(rows, bins)`."""
    weights = None if weights is None else weights.reshape(-1)
    own = index - rows.start * bins if rows.start else index
    return torch.bincount(own.reshape(-1), weights, minlength=len(index) * bins).view(len(index), bins)


def _output_table(band: Band) -> tuple[Tensor, Tensor]:
    """Return constant and slope of f, in units of the block, `(groups, bins, 2)` in float32, and f′ at the nodes."""
    f, slopes = output_at(band.nodes.points, band.steps[0], band.nodes.scaled.temperature)
    f = band.nodes.scaled.outward(f.double())
    return _packed(_line(to_middles(f), to_middles(slopes), band.bins.middles())), slopes


def _gradient_table(band: Band, slopes: Tensor, block: Tensor, index: Tensor, grad: Tensor, implicit: bool) -> Tensor:
    """Return constant and slope of f′ and of q, `(groups, bins, 4)` in float32."""
    sums = _sums(band, block, index, grad)
    q = band.nodes.gradient(band.steps, sums, implicit)
    middles, per_unit = band.bins.middles(), band.bins.per_unit
    return _packed(*(_line(values, _changes(values) * per_unit, middles) for values in map(to_middles, (slopes, q))))


def _sums(band: Band, block: Tensor, index: Tensor, grad: Tensor) -> Tensor:
    """Sum the output's gradient over what the nodes stand for; see [`to_nodes`]."""
    bins, few = band.bins, block.shape[1] < _MANY
    dtype = torch.float64 if band.crowded else torch.float32
    sums = torch.zeros(band.offsets.shape, dtype=dtype)
    moments = torch.zeros_like(sums)
    for rows, (piece, part, where) in pieces_of(block, grad, index, least=MOST_PIECE):
        part = part.to(dtype)
        sums[rows] += _histogram(where, part, rows, bins.count)
        if few:
            distance = bins.place(piece, rows).frac_().sub_(0.5)
            moments[rows] += _histogram(where, distance * part, rows, bins.count)
    return to_nodes(sums.float(), (moments if few else band.offsets * sums).float(), band.offsets)


def pieces_of(*parts: Tensor, least: int = _LEAST_PIECE) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Walk over blocks of one shape together, like [`hf_r2.grain.pieces`], but in pieces for look-ups."""
    groups, n = parts[0].shape
    size = min(MOST_PIECE, max(least, groups * n // _PIECES))
    rows = max(1, size // n)
    for first in range(0, groups, rows):
        band = slice(first, first + rows)
        for column in range(0, n, size):
            yield band, tuple(part[band, column : column + size] for part in parts)


def _write(target: Tensor, constant: Tensor, slope: Tensor, values: Tensor) -> None:
    """Write `constant + slope · values` straight to its place in float32, or round it."""
    if target.dtype == torch.float32:
        torch.addcmul(constant, slope, values, out=target)
    else:
        target.copy_(torch.addcmul(constant, slope, values))


def _changes(values: Tensor) -> Tensor:
    """Return changes per bin, `(groups, bins)`, from both neighbours."""
    change = values.diff(dim=1)
    return (torch.cat([change[:, :1], change], dim=1) + torch.cat([change, change[:, -1:]], dim=1)) / 2


def _line(values: Tensor, slopes: Tensor, middles: Tensor) -> tuple[Tensor, Tensor]:
    """Return constants and slopes of lines that have these values in the middles of bins."""
    return values - slopes * middles, slopes


def _packed(*lines: tuple[Tensor, Tensor]) -> Tensor:
    """Put lines of `(groups, bins)` side by side, in float32."""
    return torch.stack([part for line in lines for part in line], dim=-1)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Look up all columns of a table `(groups, bins, 2 or 4)` at once, as one wide number: `(rows, n, 2 or 4)`."""
    wide = {2: torch.int64, 4: torch.complex128}[table.shape[2]]
    found = table.flatten(0, 1).view(wide)[:, 0].index_select(0, index.reshape(-1))
    return found[:, None].view(torch.float32).view(*index.shape, -1)
