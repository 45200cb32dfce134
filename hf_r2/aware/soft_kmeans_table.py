"""Soft k-means of scalars by tables.

The soft weight is a smooth function of the weight, so it is computed at few nodes, interpolated to the middles of many
narrow bins and continued linearly within each: one look-up per element, for any number of clusters and iterations. The
iterations themselves run on the nodes, which carry the elements' counts as cubic interpolation does: sums over the
nodes are sums over all elements of the interpolated function.
"""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_bins import COUNTED_PIECE, MOST_BINS, PIECE, Bins, bands_of
from hf_r2.aware.soft_kmeans_lines import FusedLines, Lines
from hf_r2.aware.soft_kmeans_nodes import Nodes
from hf_r2.aware.soft_kmeans_spread import Spread
from hf_r2.aware.soft_kmeans_steps import Scaled, Step

LEAST_BINS = 1 << 12
"""For values that stand for all others of their bin; rows that are short make do with fewer."""

_BIN = 0.025
"""By how much a logit may change within a bin: linear continuation then leaves gradients four correct digits."""

_BINS_PER_NODE = 8

_ELEMENTS_PER_BIN = 2
"""With fewer, passes over all elements cost no more than the tables."""

_MANY = 1 << 18
"""Of this many elements, where in its bin each lies averages out in sums."""

_SPIKE, _CROWD = 1 / 1024, 1 / 64
"""Shares of the elements: more in one bin may be a spike, whose place in it matters; even more crowd it."""


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
    def forward(ctx: Any, block: Tensor, table: Table, implicit: bool, compiled: bool) -> Tensor:
        """Evaluate f."""
        output = torch.empty(block.shape, dtype=block.dtype)
        f, slopes = table.nodes.output(table.steps[0])
        _write(output, table.nodes.scaled.outward(f.double()), table.bins, compiled, table.index, block)
        # The index and f′ are saved as tensors, so that autograd can free them
        ctx.table, ctx.implicit, ctx.compiled = table._replace(index=None, offsets=None), implicit, compiled
        ctx.save_for_backward(block, table.index, table.offsets, slopes)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Evaluate f′ and q."""
        block, index, offsets, slopes = ctx.saved_tensors
        table = ctx.table._replace(index=index, offsets=offsets)
        q = table.nodes.gradient(table.steps, _sums(table, block, grad), ctx.implicit)
        result = torch.empty(block.shape, dtype=block.dtype)
        _write(result, torch.cat([slopes, q], dim=1), table.bins, ctx.compiled, index, block, grad)
        return result, None, None, None


def _write(target: Tensor, values: Tensor, bins: Bins, compiled: bool, *parts: Tensor) -> None:
    """Evaluate functions given by their values at the nodes, `(groups, 1 or 2, nodes)`; see [`Lines.write`]."""
    lines = FusedLines() if compiled else Lines()
    for rows, pieces in bands_of(target, *parts, size=max(PIECE, target.shape[1]) if compiled else PIECE):
        table = _lines(values[rows], bins.of_groups(rows))
        for piece in pieces:
            lines.write(table, *piece)


def tabulate(block: Tensor, start: Tensor, scaled: Scaled, spread: Spread) -> Table | None:
    """Cut the elements of a block `(groups, n)` on a CPU into bins and run soft k-means on them.

    Args:
        block: float16, bfloat16 or float32.
        start: centroids `(groups, k, 1)` in scaled units, float64.
        scaled: units, temperature and stop rule.
        spread: of the block.

    Returns:
        The table; None where bins would be too many or too wide, and [`ExactSoftKMeans`] should do it instead.
    """
    low, high = spread.low[:, None], spread.high[:, None]
    reach, largest = high.double() - low.double(), torch.maximum(low.abs(), high.abs()).double()
    # Values far from zero, compared with their spread, would lose their last digits in a linear continuation
    if not bool(((reach > largest / 2) & (reach > 1e-30) & (largest < 1e30)).all()):
        return None
    wanted = _bins_for([Step(start, start, start, None)], reach, scaled)
    most = min(MOST_BINS, _whole_cells(block.shape[1] / _ELEMENTS_PER_BIN))
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
    # NumPy, because these are many operations on few numbers
    centroids = np.sort(torch.stack([step.old[..., 0] for step in steps]).numpy(), axis=2)
    temperature, scale = (each[:, 0, 0].numpy() for each in (scaled.temperature, scaled.scale))
    gap = (centroids[..., 1:] - centroids[..., :-1]).max(axis=(0, 2), initial=0)
    span = (centroids[..., -1] - centroids[..., 0]).max(axis=0)
    # A logit changes fastest between neighbours far apart, or across as many as share one temperature
    slope = 2 / temperature * np.maximum(gap, np.minimum(span, np.sqrt(temperature)))
    bins = float((reach[:, 0].numpy() / scale * slope).max()) / _BIN
    return _whole_cells(bins + _BINS_PER_NODE) if bins else 0


def _whole_cells(bins: float) -> int:
    return _BINS_PER_NODE * math.floor(bins / _BINS_PER_NODE)


def _run(block: Tensor, start: Tensor, scaled: Scaled, bins: Bins) -> Table:
    index, offsets = torch.empty(block.shape, dtype=torch.int16), torch.empty(len(block), bins.count)
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
        crowded = crowded or most > _CROWD
    nodes = Nodes(points, weights, scaled)
    return Table(index, bins, offsets, crowded, nodes, nodes.iterate(start))


def _node_values(bins: Bins) -> Tensor:
    """Where the nodes lie, `(groups, 1, nodes)` in float64; see [`to_nodes`]."""
    number = torch.arange(-2, bins.count // _BINS_PER_NODE + 2) * _BINS_PER_NODE
    return (bins.low.double() + (number + 0.5) / bins.per_unit.double())[:, None]


def _sums(table: Table, block: Tensor, grad: Tensor) -> Tensor:
    """Sum the output's gradient over what the nodes stand for; see [`to_nodes`]."""
    few, dtype = block.shape[1] < _MANY, torch.float64 if table.crowded else torch.float32
    result = torch.empty_like(table.nodes.points)
    for rows, pieces in bands_of(block, table.index, grad, size=COUNTED_PIECE):
        sums, moments = table.bins.of_groups(rows).sums(pieces, dtype, moments=few)
        offsets = table.offsets[rows]
        result[rows] = to_nodes(sums.float(), (moments if few else offsets * sums).float(), offsets)
    return result


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
    spread = torch.zeros(groups * cells, 4)
    for term, share in zip((values, moments, moments * offsets), _cubic_terms(), strict=True):
        spread.addmm_(term.view(-1, _BINS_PER_NODE), share)
    result = torch.zeros(groups, 1, cells + 4)
    for number, share in enumerate(spread.view(groups, cells, 4).unbind(-1)):
        result[:, 0, number + 1 : number + 1 + cells].add_(share)
    return result


@cache
def _cubic_terms() -> Tensor:
    """Shares of the four nodes around a bin in a value there, cubic, as a Taylor polynomial of second order.

    Returns:
        Coefficients of the distance from the bin's middle, in bins, to the power 0, 1 and 2, for the bins between two
        nodes: `(powers, bins, 4)`.
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
    terms = [torch.stack(term, dim=1) * scale for term, scale in zip((shares, slopes, bends), scales, strict=True)]
    return torch.stack(terms)


def _lines(values: Tensor, bins: Bins) -> Tensor:
    """Interpolate functions between the nodes by a line in each bin.

    Args:
        values: of m functions at the nodes, `(groups, m, nodes)`.
        bins: of these groups.

    Returns:
        Constant and slope of every function in every bin, `(groups, bins, 2 m)`, float32.
    """
    groups, functions = values.shape[:2]
    around = values.float().unfold(2, 4, 1)[:, :, 1:].transpose(1, 2).reshape(-1, 4 * functions)
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
    separate = torch.eye(functions, device="cpu")[:, None, None, :, None] * terms[None, :, :, None]
    return separate.reshape(4 * functions, -1)
