"""Soft k-means of scalars by tables.

The soft weight is a smooth function of the weight, so it is computed in the middle of many narrow bins and continued
linearly within each: one look-up per element, for any number of clusters and iterations. The iterations themselves run
on few nodes, which carry the elements' counts as cubic interpolation does: sums over the nodes are sums over all
elements of the interpolated function.
"""

import math
from collections.abc import Callable, Iterator
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

_BINS_PER_NODE = 4

_ELEMENTS_PER_BIN = 4
"""With fewer, passes over all elements cost no more than the tables."""

_MANY = 1 << 18
"""Of this many elements, where in its bin each lies averages out in sums of the output's gradient."""

_ENTRIES = 1 << 19
"""Entries of the tables, groups × clusters × bins, that are worked on at a time."""

_PIECE = 1 << 17
"""Elements that a pass over the block works on at a time."""


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
        """Middles of the bins, `(groups, 1, bins)` in float64."""
        return self._at(torch.arange(self.count))

    def nodes(self) -> Tensor:
        """Nodes, `(groups, 1, nodes)` in float64; see [`Spread`]."""
        return self._at(torch.arange(-2, self.count // _BINS_PER_NODE + 2) * _BINS_PER_NODE)

    def _at(self, number: Tensor) -> Tensor:
        return (self.low.double() + (number + 0.5) / self.per_unit.double())[:, None]


class Table(NamedTuple):
    """What the passes over all elements of a block need.

    Args:
        scaled: units, temperature and stop rule.
        bins: the bins.
        index: of each element's bin, plus the bins of the rows before it in its piece, int32, shape of the block.
        offsets: of the bins' means from their middles, in bins, `(groups, bins)`.
        bands: groups that are worked on together, with their nodes and steps.
    """

    scaled: Scaled
    bins: Bins
    index: Tensor
    offsets: Tensor
    bands: list[tuple[slice, Nodes, list[Step]]]


class Spread:
    """Cubic interpolation between nodes that are `_BINS_PER_NODE` bins apart.

    Args:
        offsets: see [`Table`].
    """

    def __init__(self, offsets: Tensor) -> None:
        # Two nodes precede the first bin, so that the four around every place exist
        places = (torch.arange(offsets.shape[1]) + offsets.double()) / _BINS_PER_NODE + 2
        first = places.floor()
        self._first = first.long() - 1
        self._within = places - first
        self.nodes = offsets.shape[1] // _BINS_PER_NODE + 4

    def to_nodes(self, values: Tensor, moments: Tensor | None = None) -> Tensor:
        """Distribute values of the bins `(groups, bins)` to the nodes `(groups, nodes)`.

        Args:
            values: sums over the elements of the bins.
            moments: sums of what was summed times the distances from the bins' means, in bins; None if they vanish.
        """
        result = values.new_zeros(len(values), self.nodes)
        slopes = _cubic_slopes(self._within)
        for number, share in enumerate(_cubic(self._within)):
            part = values * share
            if moments is not None:
                part.addcmul_(moments, slopes[number], value=1 / _BINS_PER_NODE)
            result.scatter_add_(1, self._first + number, part)
        return result


def _cubic(t: Tensor) -> list[Tensor]:
    """Shares of the four nodes at −1, 0, 1 and 2 in a value at t of [0, 1]."""
    before, after, second = t + 1, t - 1, t - 2
    return [t * after * second / -6, before * after * second / 2, before * t * second / -2, before * t * after / 6]


def _cubic_slopes(t: Tensor) -> list[Tensor]:
    """Return the derivatives of these shares in t."""
    square = t * t
    return [
        (3 * square - 6 * t + 2) / -6,
        (3 * square - 4 * t - 1) / 2,
        (3 * square - 2 * t - 2) / -2,
        (3 * square - 1) / 6,
    ]


def to_middles(values: Tensor) -> Tensor:
    """Interpolate values at the nodes `(groups, nodes)` to the bins' middles `(groups, bins)`."""
    shares = torch.stack(_cubic(torch.arange(_BINS_PER_NODE, dtype=values.dtype) / _BINS_PER_NODE))
    return (values.unfold(1, 4, 1)[:, 1:] @ shares).flatten(1)


class TableSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by a table that [`tabulate`] made."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, table: Table, implicit: bool) -> Tensor:
        """Look up f, continued linearly by f′."""
        output = torch.empty(block.shape, dtype=block.dtype)
        f, slopes = _output_table(table)
        pairs = _packed(f - slopes * table.bins.middles()[:, 0], slopes)
        for groups, (piece, index, target) in _pieces(block, table.index, output):
            found = look_up(pairs[groups], index)
            _write(target, torch.addcmul, found[..., 0], found[..., 1], piece)
        # The index and f′ are saved as tensors, so that autograd can free them
        ctx.table, ctx.implicit = table._replace(index=None), implicit
        ctx.save_for_backward(block, table.index, slopes.float())
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Look up f′ and q, both continued linearly."""
        block, index, slopes = ctx.saved_tensors
        q = _gradient_table(ctx.table._replace(index=index), block, grad, ctx.implicit)
        middles, columns = ctx.table.bins.middles()[:, 0], []
        for values in (slopes.double(), q):
            change = _changes(values) * ctx.table.bins.per_unit
            columns += [values - change * middles, change]
        quads, result = _packed(*columns), torch.empty(block.shape, dtype=block.dtype)
        for groups, (piece, where, part, target) in _pieces(block, index, grad, result):
            found = look_up(quads[groups], where)
            own = torch.addcmul(found[..., 0], found[..., 1], piece).mul_(part)
            _write(target, torch.add, torch.addcmul(found[..., 2], found[..., 3], piece), own)
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
    steps = [Step(start, start, start, None)]
    wanted = _bins_for(steps, reach, scaled)
    enough = block.shape[1] // _ELEMENTS_PER_BIN
    least = min(LEAST_BINS, enough // _BINS_PER_NODE * _BINS_PER_NODE)
    while 0 < (wanted := max(wanted, least)) <= min(MOST_BINS, enough):
        table = _run(block, start, scaled, Bins.of(low, high, wanted))
        count, wanted = (
            wanted,
            max(_bins_for(steps, reach[groups], scaled.of(groups)) for groups, _, steps in table.bands),
        )
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
    return _BINS_PER_NODE * math.ceil(bins / _BINS_PER_NODE)


def _run(block: Tensor, start: Tensor, scaled: Scaled, bins: Bins) -> Table:
    index, counts, offsets = _assign(block, bins)
    dtype = scaled.arithmetic(block)
    bands = []
    for groups in _bands(len(block), start.shape[1] * bins.count):
        points = scaled.of(groups).inward(bins.of_groups(groups).nodes()).to(dtype)
        weights = Spread(offsets[groups]).to_nodes(counts[groups])
        nodes = Nodes(points, weights[:, None], scaled.of(groups))
        bands.append((groups, nodes, nodes.iterate(start[groups])))
    return Table(scaled, bins, index, offsets, bands)


def _bands(groups: int, entries: int) -> list[slice]:
    size = max(1, _ENTRIES // entries)
    return [slice(first, first + size) for first in range(0, groups, size)]


def _assign(block: Tensor, bins: Bins) -> tuple[Tensor, Tensor, Tensor]:
    """Index of each element's bin, numbers of elements in the bins, and offsets of their means; see [`Table`]."""
    index = torch.empty(block.shape, dtype=torch.int32)
    counts = torch.zeros(len(block), bins.count, dtype=torch.int64)
    sums = torch.zeros(counts.shape)
    for groups, (piece, target) in _pieces(block, index):
        place = bins.place(piece, groups)
        target.copy_(place)
        place.frac_()
        if len(target) > 1:
            target += torch.arange(len(target), dtype=torch.int32)[:, None] * bins.count
        counts[groups] += _histogram(target, None, bins.count)
        sums[groups] += _histogram(target, place, bins.count)
    return index, counts.double(), torch.where(counts > 0, sums / counts - 0.5, 0)


def _histogram(index: Tensor, weights: Tensor | None, bins: int) -> Tensor:
    """Count, or sum weights, over the bins of the rows of a piece: `(rows, bins)`."""
    weights = None if weights is None else weights.reshape(-1)
    return torch.bincount(index.reshape(-1), weights, minlength=len(index) * bins).view(len(index), bins)


def _output_table(table: Table) -> tuple[Tensor, Tensor]:
    """Return f, in units of the block, and f′ in the middles of all bins, `(groups, bins)` in float64."""
    f, slopes = torch.empty(2, *table.offsets.shape, dtype=torch.float64)
    for groups, nodes, steps in table.bands:
        scaled = nodes.scaled
        points = scaled.inward(table.bins.of_groups(groups).middles()).to(nodes.points.dtype)
        values, slope = output_at(points, steps[0], scaled.temperature)
        f[groups], slopes[groups] = scaled.outward(values.double())[:, 0], slope[:, 0].double()
    return f, slopes


def _gradient_table(table: Table, block: Tensor, grad: Tensor, implicit: bool) -> Tensor:
    """Return q in the middles of all bins, `(groups, bins)` in float64."""
    bins, few = table.bins, block.shape[1] < _MANY
    sums = torch.zeros(table.offsets.shape)
    moments = torch.zeros(table.offsets.shape) if few else None
    for groups, (piece, part, index) in _pieces(block, grad, table.index):
        part = part.float()
        sums[groups] += _histogram(index, part, bins.count)
        if few:
            distance = bins.place(piece, groups).frac_().sub_(0.5).mul_(part)
            moments[groups] += _histogram(index, distance, bins.count)
    q = torch.empty(sums.shape, dtype=torch.float64)
    for groups, nodes, steps in table.bands:
        grads, offsets = sums[groups].double(), table.offsets[groups]
        around = moments[groups] - offsets * grads if few else None
        grads = Spread(offsets).to_nodes(grads, around)
        q[groups] = to_middles(nodes.gradient(steps, grads[:, None], implicit)[:, 0].double())
    return q


def _pieces(*parts: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Walk over blocks of one shape together, like [`hf_r2.grain.pieces`], but in pieces for look-ups."""
    groups, n = parts[0].shape
    rows = max(1, _PIECE // n)
    for first in range(0, groups, rows):
        band = slice(first, first + rows)
        for column in range(0, n, _PIECE):
            yield band, tuple(part[band, column : column + _PIECE] for part in parts)


def _write(target: Tensor, operation: Callable[..., Tensor], *operands: Tensor) -> None:
    """Write a float32 result straight to its place, or round it."""
    if target.dtype == torch.float32:
        operation(*operands, out=target)
    else:
        target.copy_(operation(*operands))


def _changes(values: Tensor) -> Tensor:
    """Return changes per bin, `(groups, bins)`, from both neighbours."""
    change = values.diff(dim=1)
    return (torch.cat([change[:, :1], change], dim=1) + torch.cat([change, change[:, -1:]], dim=1)) / 2


def _packed(*columns: Tensor) -> Tensor:
    return torch.stack(columns, dim=-1).float()


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Look up all columns of a table `(rows, bins, 2 or 4)` at once, as one wide number: `(rows, n, 2 or 4)`."""
    wide = {2: torch.int64, 4: torch.complex128}[table.shape[2]]
    found = table.flatten(0, 1).view(wide)[:, 0].index_select(0, index.reshape(-1))
    return found[:, None].view(torch.float32).view(*index.shape, -1)
