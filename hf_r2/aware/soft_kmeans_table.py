"""Soft k-means of scalars by tables.

The soft weight is a smooth function of the weight, so it is computed at few nodes and interpolated by cubics: one
look-up per element, for any number of clusters and iterations. The iterations themselves run on the nodes, which carry
the elements' counts as cubic interpolation does: sums over the nodes are sums over all elements of the interpolated
function. For long rows the cubics are cut into lines in many narrow bins, which take more tables and less arithmetic.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_bins import MOST_BINS
from hf_r2.aware.soft_kmeans_cubics import CubicTable
from hf_r2.aware.soft_kmeans_lines import BINS_PER_NODE, LineTable
from hf_r2.aware.soft_kmeans_spread import Spread
from hf_r2.aware.soft_kmeans_steps import Scaled, Step

LEAST_BINS = 1 << 12
"""Where lines continue what stands for all values of a bin; rows that are short make do with fewer."""

_BIN = 0.025
"""By how much a logit may change within a bin: linear continuation then leaves gradients four correct digits."""

_ELEMENTS_PER_BIN = 2
"""With fewer, tables of lines cost more than what they save."""

Table = LineTable | CubicTable


class TableSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by a table that [`tabulate`] made."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, table: Table, implicit: bool, compiled: bool) -> Tensor:
        """Evaluate f."""
        output = torch.empty(block.shape, dtype=block.dtype)
        f, slopes = table.nodes.output(table.steps[0])
        table.write(output, table.nodes.scaled.outward(f.double()), compiled, block)
        # What is large is saved as tensors, so that autograd can free it
        ctx.table, ctx.implicit, ctx.compiled = table.holding(*[None] * len(table.large)), implicit, compiled
        ctx.save_for_backward(block, slopes, *table.large)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Evaluate f′ and q."""
        block, slopes, *large = ctx.saved_tensors
        table = ctx.table.holding(*large)
        q = table.nodes.gradient(table.steps, table.node_sums(block, grad), ctx.implicit)
        result = torch.empty(block.shape, dtype=block.dtype)
        table.write(result, torch.cat([slopes, q], dim=1), ctx.compiled, block, grad)
        return result, None, None, None


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
    n, k = block.shape[1], start.shape[1]
    most_lines = min(MOST_BINS, _whole_cells(n / _ELEMENTS_PER_BIN))
    # Cubics cost two clusters' attention for each element, and that of all clusters for each node
    most_cubics = min(MOST_BINS, _whole_cells(n * (1 / 2 - 1 / k) * BINS_PER_NODE))
    wanted = _bins_for([Step(start, start, start, None)], reach, scaled)
    while wanted <= max(most_lines, most_cubics):
        # Centroids may drift apart: bins to spare cost less than a second run
        count = _whole_cells(wanted * 9 / 8)
        if wanted <= most_lines:
            count = min(max(count, LEAST_BINS), most_lines)
            table = LineTable.run(block, start, scaled, low, high, count)
        else:
            count = min(count, most_cubics)
            table = CubicTable.run(block, start, scaled, low, high, count // BINS_PER_NODE)
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
    return max(_whole_cells(bins + BINS_PER_NODE), 2 * BINS_PER_NODE)


def _whole_cells(bins: float) -> int:
    return BINS_PER_NODE * math.floor(bins / BINS_PER_NODE)
