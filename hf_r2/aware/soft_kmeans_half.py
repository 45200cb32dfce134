"""Soft k-means of 16-bit scalars: the bit pattern of a weight is its bin, so that nothing is interpolated.

There are at most 65,536 distinct weights, whatever their number, and all that soft k-means computes is the same for
equal ones. The observation is from eDKM, arXiv 2309.00964, which compresses saved attention by it; here nothing else is
computed.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.aware.soft_kmeans_bins import (
    COUNTED_PIECE,
    MOST_BINS,
    LookUp,
    Scratch,
    bands_of,
    histogram,
    piece_size,
    unsigned,
)
from hf_r2.aware.soft_kmeans_nodes import Nodes
from hf_r2.aware.soft_kmeans_steps import Scaled, Step


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
    if block.dtype not in (torch.float16, torch.bfloat16) or len(block) > 1 or block.shape[1] < 2 * MOST_BINS:
        return None
    counts, scratch = torch.zeros(MOST_BINS, dtype=torch.int64), Scratch()
    for _, pieces in bands_of(block, size=COUNTED_PIECE):
        for (piece,) in pieces:
            counts += histogram(_patterns(piece, scratch), None, MOST_BINS)[0]
    pattern = counts.nonzero()[:, 0]
    values = torch.arange(MOST_BINS, dtype=torch.int32).to(torch.int16).view(block.dtype)[pattern]
    points = scaled.inward(values.double()[None, None]).to(scaled.arithmetic(block))
    nodes = Nodes(points, counts[pattern][None, None], scaled)
    return Distinct(pattern, nodes, nodes.iterate(start))


class DistinctSoftKMeans(torch.autograd.Function):
    """Soft weights of a block by what [`distinguish`] found."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, distinct: Distinct, implicit: bool) -> Tensor:
        """Look up f."""
        ctx.distinct, ctx.implicit = distinct, implicit
        f, slopes = distinct.nodes.output(distinct.steps[0])
        ctx.save_for_backward(block, slopes[0, 0])
        table = torch.zeros(MOST_BINS, dtype=block.dtype)
        table[distinct.pattern] = distinct.nodes.scaled.outward(f)[0, 0].to(block.dtype)
        output, scratch = torch.empty(block.shape, dtype=block.dtype), Scratch()
        for _, pieces in bands_of(block, output, size=piece_size()):
            for piece, target in pieces:
                torch.index_select(table, 0, _patterns(piece, scratch)[0], out=target[0])
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Look up f′ and q."""
        (block, slopes), (pattern, nodes, steps) = ctx.saved_tensors, ctx.distinct
        sums, scratch = torch.zeros(MOST_BINS, dtype=torch.float64), Scratch()
        for _, pieces in bands_of(block, grad, size=COUNTED_PIECE):
            for piece, part in pieces:
                sums += histogram(_patterns(piece, scratch), part.double(), MOST_BINS)[0]
        table = torch.zeros(1, MOST_BINS, 2, dtype=torch.float32)
        table[0, pattern, 0] = slopes.float()
        table[0, pattern, 1] = nodes.gradient(steps, sums[pattern][None, None], ctx.implicit)[0, 0].float()
        result = torch.empty(block.shape, dtype=block.dtype)
        look_up, scratch = LookUp(), Scratch()
        for _, pieces in bands_of(block, grad, result, size=piece_size()):
            for piece, part, target in pieces:
                slope, own = look_up(table, _patterns(piece, scratch))
                target.copy_(torch.addcmul(own, slope, part.float()))
        return result, None, None


def _patterns(piece: Tensor, scratch: Scratch) -> Tensor:
    return unsigned(piece.view(torch.int16), scratch)
