"""Soft k-means of 16-bit scalars: the bit pattern of a weight is its bin, so that nothing is interpolated.

There are at most 65,536 distinct weights, whatever their number, and all that soft k-means computes is the same for
equal ones. The observation is from eDKM, arXiv 2309.00964, which compresses saved attention by it; here nothing else is
computed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_nodes import Nodes, output_at
from hf_r2.aware.soft_kmeans_steps import Scaled, Step
from hf_r2.aware.soft_kmeans_table import MOST_PIECE, look_up, pieces_of

PATTERNS = 1 << 16


class Distinct(NamedTuple):
    """The distinct values of a block of one group, and soft k-means of them.

    Args:
        pattern: bits of each value, int64.
        nodes: the values, counted.
        steps: the iterations.
    """

    pattern: Tensor
    nodes: Nodes
    steps: list[Step]


def distinguish(block: Tensor, start: Tensor, scaled: Scaled) -> Distinct | None:
    """Count the distinct values of a block and run soft k-means on them.

    Args:
        block: `(1, n)` on a CPU, float16 or bfloat16.
        start: centroids `(1, k, 1)` in scaled units, float64.
        scaled: units, temperature and stop rule.

    Returns:
        The values; None for other blocks, and for short ones, where distinct values are not much fewer.
    """
    if block.dtype not in (torch.float16, torch.bfloat16) or len(block) > 1 or block.shape[1] < 2 * PATTERNS:
        return None
    counts = torch.zeros(PATTERNS, dtype=torch.int64)
    for _, (piece,) in pieces_of(block, least=MOST_PIECE):
        counts += torch.bincount(_patterns(piece), minlength=PATTERNS)
    pattern = counts.nonzero()[:, 0]
    values = torch.arange(PATTERNS, dtype=torch.int32).to(torch.int16).view(block.dtype)[pattern]
    points = scaled.inward(values.double()[None, None]).to(scaled.arithmetic(block))
    nodes = Nodes(points, counts[pattern][None, None], scaled)
    return Distinct(pattern, nodes, nodes.iterate(start))


class DistinctSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by what [`distinguish`] found."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, distinct: Distinct, implicit: bool) -> Tensor:
        """Look up f."""
        ctx.distinct, ctx.implicit = distinct, implicit
        f, slopes = output_at(distinct.nodes.points, distinct.steps[0], distinct.nodes.scaled.temperature)
        ctx.save_for_backward(block, slopes[0, 0])
        table = torch.zeros(PATTERNS, dtype=block.dtype)
        table[distinct.pattern] = distinct.nodes.scaled.outward(f)[0, 0].to(block.dtype)
        output = torch.empty(block.shape, dtype=block.dtype)
        for _, (piece, target) in pieces_of(block, output):
            torch.index_select(table, 0, _patterns(piece), out=target[0])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Look up f′ and q."""
        (block, slopes), (pattern, nodes, steps) = ctx.saved_tensors, ctx.distinct
        sums = torch.zeros(PATTERNS, dtype=torch.float64)
        for _, (piece, part) in pieces_of(block, grad, least=MOST_PIECE):
            sums += torch.bincount(_patterns(piece), part[0].double(), minlength=PATTERNS)
        table = torch.zeros(1, PATTERNS, 2)
        table[0, pattern, 0] = slopes.float()
        table[0, pattern, 1] = nodes.gradient(steps, sums[pattern][None, None], ctx.implicit)[0, 0].float()
        result = torch.empty(block.shape, dtype=block.dtype)
        for _, (piece, part, target) in pieces_of(block, grad, result):
            found = look_up(table, _patterns(piece))
            target[0].copy_(torch.addcmul(found[..., 1], found[..., 0], part[0].float()))
        return result, None, None


def _patterns(piece: Tensor) -> Tensor:
    """Bits of 16-bit numbers `(1, n)`: int32, `(n,)`."""
    return piece[0].contiguous().view(torch.int16).int().bitwise_and_(PATTERNS - 1)
