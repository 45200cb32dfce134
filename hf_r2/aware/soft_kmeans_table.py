"""Soft k-means of scalars by tables.

The soft weight is a smooth function of the weight, so it is computed at few nodes, interpolated to the middles of many
narrow bins and continued linearly within each: one look-up per element, for any number of clusters and iterations. The
iterations themselves run on the nodes, which carry the elements' counts as cubic interpolation does: sums over the
nodes are sums over all elements of the interpolated function.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_bins import MOST_BINS, Bins, LookUp, bands_of, unsigned
from hf_r2.aware.soft_kmeans_nodes import Nodes
from hf_r2.aware.soft_kmeans_steps import Scaled, Step

LEAST_BINS = 1 << 12
"""For values that stand for all others of their bin; rows that are short make do with fewer."""

_BIN = 0.025
"""By how much a logit may change within a bin: linear continuation then leaves gradients four correct digits."""

_BINS_PER_NODE = 8

_ELEMENTS_PER_BIN = {"few": 4, "many": 2}
"""With fewer, passes over all elements cost no more than the tables; with many clusters, from 8 on, they cost more."""

_MANY = 1 << 18
"""Of this many elements, where in its bin each lies averages out in sums of the output's gradient."""

_CROWD = 64
"""A bin is crowded with more than this share, 1 / 64, of the elements."""


class Table(NamedTuple):
    """What the passes over all elements of a block need.

    Args:
        index: the number of each element's bin, see [`Bins.assign`].
        bins: of all groups.
        offsets: of the bins' means from their middles, in bins, `(groups, bins)`.
        crowded: whether a bin holds so many elements of its row that a float32 sum over them would lose digits.
        nodes: see [`to_nodes`].
        steps: the iterations.
    """

    index: Tensor
    bins: Bins
    offsets: Tensor
    crowded: bool
    nodes: Nodes
    steps: list[Step]


class TableSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by a table that [`tabulate`] made."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, table: Table, implicit: bool) -> Tensor:
        """Look up f, continued linearly."""
        output = torch.empty(block.shape, dtype=block.dtype)
        f, slopes = table.nodes.output(table.steps[0])
        f = table.nodes.scaled.outward(f.double())
        for rows, pieces in bands_of(block, table.index, output):
            lines = LookUp(_lines(f[rows], table.bins.of_groups(rows)))
            for piece, numbers, target in pieces:
                constant, slope = lines(unsigned(numbers, table.bins.count))
                _write(target, constant, slope, piece)
        # The index and f′ are saved as tensors, so that autograd can free them
        ctx.table, ctx.implicit = table._replace(index=None, offsets=None), implicit
        ctx.save_for_backward(block, table.index, table.offsets, slopes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Look up f′ and q, both continued linearly."""
        block, index, offsets, slopes = ctx.saved_tensors
        table = ctx.table._replace(index=index, offsets=offsets)
        q = table.nodes.gradient(table.steps, _sums(table, block, grad), ctx.implicit)
        both = torch.cat([slopes, q], dim=1)
        result = torch.empty(block.shape, dtype=block.dtype)
        for rows, pieces in bands_of(block, index, grad, result):
            lines = LookUp(_lines(both[rows], table.bins.of_groups(rows)))
            for piece, numbers, part, target in pieces:
                constant, slope, own_constant, own_slope = lines(unsigned(numbers, table.bins.count))
                own = torch.addcmul(own_constant, own_slope, piece)
                _write(target, own, torch.addcmul(constant, slope, piece), part)
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
        wanted = _bins_for(table.steps, reach, scaled)
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
    index, counts, moments = bins.assign(block)
    crowded = bool((counts > block.shape[1] / _CROWD).any())
    offsets = moments / counts.clamp_min(1)
    points = scaled.inward(_node_values(bins)).to(scaled.arithmetic(block))
    nodes = Nodes(points, to_nodes(counts.float(), moments, offsets), scaled)
    return Table(index, bins, offsets, crowded, nodes, nodes.iterate(start))


def _node_values(bins: Bins) -> Tensor:
    """Where the nodes lie, `(groups, 1, nodes)` in float64; see [`to_nodes`]."""
    number = torch.arange(-2, bins.count // _BINS_PER_NODE + 2) * _BINS_PER_NODE
    return (bins.low.double() + (number + 0.5) / bins.per_unit.double())[:, None]


def _sums(table: Table, block: Tensor, grad: Tensor) -> Tensor:
    """Sum the output's gradient over what the nodes stand for; see [`to_nodes`]."""
    few, dtype = block.shape[1] < _MANY, torch.float64 if table.crowded else torch.float32
    sums = table.bins.sums(block, table.index, grad, dtype, moments=few)
    return to_nodes(sums[0].float(), (sums[1] if few else table.offsets * sums[0]).float(), table.offsets)


def to_nodes(values: Tensor, moments: Tensor, offsets: Tensor) -> Tensor:
    """Distribute values of bins to nodes `_BINS_PER_NODE` bins apart, as cubic interpolation between them does.

    Shares of the nodes are continued around each bin's middle to second order in the distance, and what lies off the
    middle is taken to lie where the bin's mean does: then spikes stay in their places.

    Args:
        values: sums over the elements of the bins, `(groups, bins)`, float32.
        moments: sums of what was summed times the distances from the bins' middles, in bins.
        offsets: of the bins' means, see [`Table`].

    Returns:
        Values of the nodes, `(groups, 1, nodes)`, float32; the first of them lies two before the first bin.
    """
    groups, bins = values.shape
    cells = bins // _BINS_PER_NODE
    terms = torch.stack([values, moments, moments * offsets], dim=1).view(groups, 3, cells, -1)
    spread = torch.matmul(terms, torch.stack(_cubic_terms())).sum(dim=1)
    result = values.new_zeros(groups, 1, cells + 4)
    for number, share in enumerate(spread.unbind(-1)):
        result[:, 0, number + 1 : number + 1 + cells].add_(share)
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


def _lines(values: Tensor, bins: Bins) -> Tensor:
    """Interpolate functions between the nodes by a line in each bin.

    Args:
        values: of m functions at the nodes, `(groups, m, nodes)`.
        bins: of these groups.

    Returns:
        Constant and slope of every function in every bin, `(groups, bins, 2 m)`, float32.
    """
    around = values.float().unfold(2, 4, 1)[:, :, 1:]
    middle, slope = (around @ term.T for term in _cubic_terms()[:2])
    lines = torch.empty(*values.shape[:2], 2, bins.count)
    torch.mul(slope.flatten(2), bins.per_unit[:, None], out=lines[:, :, 1])
    torch.addcmul(middle.flatten(2), lines[:, :, 1], bins.middles()[:, None], value=-1, out=lines[:, :, 0])
    return lines.flatten(1, 2).mT.contiguous()


def _write(target: Tensor, constant: Tensor, slope: Tensor, values: Tensor) -> None:
    """Write `constant + slope · values` straight to its place in float32, or round it."""
    if target.dtype == torch.float32:
        torch.addcmul(constant, slope, values, out=target)
    else:
        target.copy_(torch.addcmul(constant, slope, values))
