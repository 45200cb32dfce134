"""The gradient of converged soft k-means by the implicit function theorem.

Centroids that one more iteration would not move satisfy c = Φ(c, x). With J = ∂Φ/∂c, a gradient v of them reaches x as
`λᵀ ∂Φ/∂x` where `(1 − J)ᵀ λ = v`: one linear system of k unknowns in place of all iterations.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_steps import LEAST_MASS, Step

MOST_CLUSTERS = 4
"""With more clusters the iterations hardly contract, and the system is ill-conditioned."""

_DAMPING = 1e-14


class Linearized(NamedTuple):
    """Derivatives at a fixed point, float64.

    Args:
        slope: gradient of the centroids, both as values of the output and through its attention, `(groups, k, 1)`.
        jacobian: J times the masses of its rows, `(groups, k, k)`.
    """

    slope: Tensor
    jacobian: Tensor


def mean_jacobian(points: Tensor, attended: Tensor, weights: Tensor | None, step: Step) -> Tensor:
    """Sum `a_k (δ_kj − a_j)(x − new_k)(x − old_j)` over scalar points, `(groups, k, k)`: J · mass · τ / 2.

    Args:
        points: `(groups, 1, n)`.
        attended: their attention, `(groups, k, n)`.
        weights: how often every point counts, `(groups, 1, n)`; None for once.
        step: the last iteration.
    """
    after = (points - step.new.to(points.dtype)) * attended
    after = after if weights is None else after * weights
    before = points - step.old.to(points.dtype)
    own = (after * before).sum(dim=2).diag_embed()
    return (own - after @ (before * attended).mT).double()


def implicit_pull(step: Step, linearized: Linearized) -> Tensor:
    """Solve for λ and return it divided by the masses, `(groups, k, 1)`."""
    moved = step.mass > LEAST_MASS
    inverse = torch.where(moved, 1 / step.mass.clamp_min(LEAST_MASS), 0)
    one = torch.eye(step.mass.shape[1], dtype=torch.float64, device=step.mass.device)
    system = (one - linearized.jacobian * inverse).mT
    # Damped normal equations: a singular system, as of equal values, has a finite solution, and no host waits for it
    normal = system.mT @ system
    normal = normal + one * (_DAMPING * normal.diagonal(dim1=1, dim2=2).sum(dim=1)[:, None, None])
    return torch.linalg.solve_ex(normal, system.mT @ linearized.slope).result * inverse
