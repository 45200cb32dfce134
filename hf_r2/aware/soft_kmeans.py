"""Differentiable k-means (DKM): soft weights, whose centroids and assignments the gradient flows through."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_exact import ExactSoftKMeans
from hf_r2.aware.soft_kmeans_half import DistinctSoftKMeans, distinguish
from hf_r2.aware.soft_kmeans_implicit import MOST_CLUSTERS
from hf_r2.aware.soft_kmeans_spread import Spread, spread_of
from hf_r2.aware.soft_kmeans_steps import Scaled
from hf_r2.aware.soft_kmeans_table import TableSoftKMeans, tabulate

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_LEAST_TEMPERATURE = 1e-20
"""In squared units of a group's size, so that logits stay finite in float32."""

_LEAST_SCALE = 1e-36


class SoftKMeans(NamedTuple):
    """What [`soft_kmeans`] returns.

    Args:
        weights: soft weights, of the block's shape and dtype, differentiable in the block.
        centroids: after the last iteration, of the start's shape, float32 (float64 for a float64 block), detached.
        masses: sums of attention in the last iteration, `(groups, k)`, in elements or vectors, float64, detached.
    """

    weights: Tensor
    centroids: Tensor
    masses: Tensor


def soft_kmeans(
    block: Tensor,
    centroids: Tensor,
    temperature: float = 0.05,
    *,
    absolute: bool = False,
    iterations: int = 3,
    tolerance: float = 1e-4,
    implicit: bool = False,
    memory: int = 256 * 2**20,
    compiled: bool = False,
) -> SoftKMeans:
    """Cluster every row of a block softly and replace its elements by attention-weighted means of the centroids.

    Per row: `A_t = softmax_k(−‖x − c_t‖² / τ)` and `c_{t+1} = Σ_x A_t x / Σ_x A_t` for t = 0 … T−1; the soft weights
    are `A_{T−1} c_T`. Gradients flow through all iterations, but not through τ and the start.
    Source: DKM, Cho et al., arXiv 2108.12659, with the squared distance of its implementation in coremltools; treating
    16-bit weights by their bit patterns is from eDKM, arXiv 2309.00964.

    Args:
        block: `(groups, n)`, float16, bfloat16, float32 or float64; statistics are kept in float32 or better.
        centroids: start, any float dtype: `(groups, k)` for scalars; `(groups, k, d)` for vectors of d consecutive
            elements, where the last vector of a row is completed with the row's first elements, as constants.
            A cluster that attracts nothing keeps its centroid.
        temperature: τ in multiples of the row's variance. At 0.05 a value between two of four clusters of normal
            weights still feels both; the smaller, the harder.
        absolute: take τ as it is, in squared units of the block.
        iterations: most iterations T.
        tolerance: on a CPU, a row stops once no coordinate of its centroids moves by more than this multiple of the
            row's standard deviation; 0 runs all iterations, as an accelerator always does: a look would stall its host.
        implicit: differentiate the fixed point instead of the iterations. Right if they have converged, so allow
            enough of them; only scalars with k ≤ 4.
        memory: bytes that temporaries of passes over all elements may take, about.
        compiled: fuse passes over the elements of long rows on a CPU with `torch.compile`.

    Returns:
        Soft weights, centroids and masses.

    Raises:
        ValueError: for shapes, dtypes or numbers other than these.
    """
    _check(block, centroids, temperature, iterations, tolerance, implicit, memory)
    start = centroids.detach().to(block.device, torch.float64).reshape(*centroids.shape[:2], -1)
    spread = spread_of(block.detach())
    scaled = _scaled(block, start, spread, temperature, absolute, iterations, tolerance)
    start = scaled.inward(start)
    # A device's host cannot look at the elements to choose bins
    tables = block.is_cpu and block.dtype != torch.float64 and centroids.dim() == 2
    distinct = distinguish(block.detach(), start, scaled) if tables else None
    table = tabulate(block.detach(), start, scaled, spread) if tables and distinct is None else None
    if distinct is not None:
        weights, (found, masses) = DistinctSoftKMeans.apply(block, distinct, implicit), distinct.steps[0][1:3]
    elif table is not None:
        weights = TableSoftKMeans.apply(block, table, implicit, compiled)
        found, masses = table.steps[0][1:3]
    else:
        weights, found, masses = ExactSoftKMeans.apply(block, start, scaled, implicit, memory)
    found = scaled.outward(found).to(torch.promote_types(block.dtype, torch.float32))
    return SoftKMeans(weights, found.reshape(centroids.shape), masses.squeeze(2))


def _check(
    block: Tensor,
    centroids: Tensor,
    temperature: float,
    iterations: int,
    tolerance: float,
    implicit: bool,
    memory: int,
) -> None:
    if block.dim() != 2 or block.numel() == 0 or block.dtype not in _DTYPES:
        raise ValueError(
            "the block must be float16, bfloat16, float32 or float64 of shape (groups, n), not empty, got "
            f"{block.dtype} of shape {tuple(block.shape)}; cut weights with hf_r2.grain.blocks"
        )
    if centroids.dim() not in (2, 3) or centroids.numel() == 0 or len(centroids) != len(block):
        raise ValueError(
            f"centroids must have shape (groups, k) or (groups, k, d) with the block's {len(block)} groups, got "
            f"{tuple(centroids.shape)}"
        )
    if not 0 < temperature < float("inf"):
        raise ValueError(f"temperature must be a positive number, got {temperature}; small ones make hard clusters")
    if iterations < 1:
        raise ValueError(f"iterations must be at least 1, got {iterations}")
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"tolerance must be 0 (run all iterations) or a positive number, got {tolerance}")
    if memory < 1:
        raise ValueError(f"memory must be a positive number of bytes, got {memory}")
    if implicit and (centroids.dim() == 3 or centroids.shape[1] > MOST_CLUSTERS):
        raise ValueError(
            f"implicit=True needs centroids of shape (groups, k) with k ≤ {MOST_CLUSTERS}, got "
            f"{tuple(centroids.shape)}: its equations are ill-conditioned beyond; use implicit=False"
        )


def _scaled(
    block: Tensor, start: Tensor, spread: Spread, temperature: float, absolute: bool, iterations: int, tolerance: float
) -> Scaled:
    """Choose units in which neither the elements nor the start centroids are large or all are small."""
    mean, variance = spread.mean[:, None, None], spread.variance[:, None, None]
    centre = mean.to(torch.promote_types(block.dtype, torch.float32)).double()
    reach = (start - centre).abs().amax(dim=(1, 2), keepdim=True)
    scale = torch.maximum(variance.sqrt(), reach)
    # Of smaller ones float32 has no reciprocal
    scale = torch.where(scale > 0, scale.clamp_min(_LEAST_SCALE), 1)
    chosen = torch.full_like(variance, temperature) if absolute else temperature * variance
    stop = None if tolerance == 0 or not block.is_cpu else tolerance * variance.sqrt() / scale
    # Equal values are their own means at any temperature
    chosen = torch.where(chosen > 0, chosen / scale / scale, 1).clamp_min(_LEAST_TEMPERATURE)
    return Scaled(centre, scale, chosen, stop, iterations)
