"""The steps of soft k-means and the way back through them, whatever the points are: all elements, or bins of them.

Groups lie along a batch dimension and clusters along the one after it: softmax over a short last dimension would take
25 times as long. Centroids and all sums are kept in float64; attention may be computed in float32.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_MASS = 1e-12
"""A cluster that attracts less than this share of one element keeps its centroid."""

FLOAT32_LOGITS = 200.0
"""Up to such logits float32 attention leaves gradients four correct digits; beyond, it is computed in float64."""

_LEAST_LOGIT = -86.0
"""Less attention than 2^−86 is as good as none, and arithmetic with denormal numbers is slow."""


class Scaled(NamedTuple):
    """What the iterations of some groups need to know, in units in which values are (value − centre) / scale.

    Shapes are `(groups, 1, 1)`, in float64.

    Args:
        centre: representable in the arithmetic of the block, so that subtracting it loses nothing.
        scale: positive.
        temperature: positive, in squared units.
        tolerance: in units; None to run all iterations.
        iterations: at most.
    """

    centre: Tensor
    scale: Tensor
    temperature: Tensor
    tolerance: Tensor | None
    iterations: int

    def of(self, band: slice) -> "Scaled":
        """Return those of a band of groups."""
        tolerance = None if self.tolerance is None else self.tolerance[band]
        return Scaled(self.centre[band], self.scale[band], self.temperature[band], tolerance, self.iterations)

    def arithmetic(self, block: Tensor) -> torch.dtype:
        """Choose the dtype of points and attention. A device's host cannot look at the temperatures: float32 there."""
        if block.dtype == torch.float64 or (block.is_cpu and bool((self.temperature * FLOAT32_LOGITS < 1).any())):
            return torch.float64
        return torch.float32

    def inward(self, values: Tensor) -> Tensor:
        """Convert values `(groups, …, …)` to these units."""
        return (values - self.centre.to(values.dtype)) * (1 / self.scale).to(values.dtype)

    def outward(self, values: Tensor) -> Tensor:
        """Convert back."""
        return values * self.scale.to(values.dtype) + self.centre.to(values.dtype)


class Step(NamedTuple):
    """One iteration: centroids `(groups, k, d)` before and after it, masses `(groups, k, 1)`; float64.

    Args:
        old: what attention was computed from.
        new: means under this attention.
        mass: sums of attention.
        active: `(groups, 1, 1)`, whether a group took this step; None if all did.
    """

    old: Tensor
    new: Tensor
    mass: Tensor
    active: Tensor | None


def iterate(start: Tensor, sums: Callable[[Tensor], tuple[Tensor, Tensor]], scaled: Scaled) -> list[Step]:
    """Run soft k-means.

    Args:
        start: centroids `(groups, k, d)`, float64.
        sums: from centroids to masses `(groups, k, 1)` and attention-weighted sums `(groups, k, d)` in float64.
        scaled: units, temperature and stop rule.

    Returns:
        The steps of every group, from its last to its first one: a group that has converged takes no more.
    """
    olds, masses = [start], []
    taken = torch.zeros_like(scaled.scale, dtype=torch.int64)
    moving = torch.ones_like(taken, dtype=torch.bool)
    for _ in range(scaled.iterations):
        old = olds[-1]
        mass, first = sums(old)
        new = torch.where(mass > LEAST_MASS, first / mass.clamp_min(LEAST_MASS), old)
        if scaled.tolerance is None:
            olds.append(new)
            masses.append(mass)
            continue
        olds.append(torch.where(moving, new, old))
        masses.append(mass)
        taken += moving
        moving = moving & ((new - old).abs().amax(dim=(1, 2), keepdim=True) > scaled.tolerance)
        if not moving.any():
            break
    if scaled.tolerance is None or bool((taken == len(masses)).all()):
        return [Step(*step, None) for step in zip(olds[-2::-1], olds[:0:-1], masses[::-1], strict=True)]
    return [_aligned(torch.stack(olds), torch.stack(masses), taken - back) for back in range(1, len(masses) + 1)]


def _aligned(centroids: Tensor, masses: Tensor, index: Tensor) -> Step:
    """Pick for every group the step that it took as its index-th."""
    groups = torch.arange(len(index), device=index.device)
    at = index.flatten().clamp_min(0)
    return Step(centroids[at, groups], centroids[at + 1, groups], masses[at, groups], index >= 0)


def unroll(steps: list[Step], slope: Tensor, back: Callable[[Step, Tensor, bool], Tensor]) -> None:
    """Propagate a gradient through all iterations, from the last to the first.

    Args:
        steps: see [`iterate`].
        slope: gradient of the last centroids, `(groups, k, d)`, float64.
        back: takes a step, the gradient of the sums divided by the masses, and whether the output was computed from
            this step; returns the gradient of its old centroids.
    """
    for number, step in enumerate(steps):
        moved = step.mass > LEAST_MASS
        if step.active is not None:
            moved = moved & step.active
        pull = torch.where(moved, slope / step.mass.clamp_min(LEAST_MASS), 0)
        # A centroid that stayed hands its gradient on
        slope = back(step, pull, number == 0) + torch.where(moved, 0, slope)


class Linear(NamedTuple):
    """What is linear in the points: `slopes @ points + offsets`, of `(groups, k, d)` and `(groups, k, 1)`."""

    slopes: Tensor
    offsets: Tensor

    @classmethod
    def logits(cls, centroids: Tensor, temperature: Tensor, dtype: torch.dtype) -> "Linear":
        """−‖x − c_k‖² / τ without the term x², which all clusters share; in powers of 2, see [`softmax_`]."""
        per_slope = temperature * (math.log(2) / 2)
        slopes = (centroids / per_slope).to(dtype)
        # Offsets of the centroids that the rounded slopes mean: then rounding errors largely cancel
        exact = slopes.double()
        return cls(slopes, (exact.square().sum(dim=2, keepdim=True) * (per_slope / -2)).to(dtype))

    @classmethod
    def pull(cls, step: Step, pull: Tensor, dtype: torch.dtype) -> "Linear":
        """Gradient of the attention through the new centroids, `pull · (x − new)`."""
        return cls(pull.to(dtype), (pull * step.new).sum(dim=2, keepdim=True).neg_().to(dtype))

    def of(self, points: Tensor) -> Tensor:
        """Of points `(groups, d, n)`: `(groups, k, n)`."""
        return torch.baddbmm(self.offsets, self.slopes, points)


def softmax_(logits: Tensor) -> Tensor:
    """Softmax over the clusters, in place, of logits in powers of 2.

    This takes half the time of torch's own, and a fraction of it where attention would underflow. On a CPU powers of 2
    take half the time of powers of e.
    """
    logits.sub_(logits.amax(dim=1, keepdim=True)).clamp_min_(_LEAST_LOGIT).exp2_()
    return logits.mul_(logits.sum(dim=1, keepdim=True).reciprocal_())


def through_softmax_(gradient: Tensor, attended: Tensor) -> Tensor:
    """Turn a gradient of the attention into one of its logits, in place."""
    gradient.mul_(attended)
    return gradient.addcmul_(attended, gradient.sum(dim=1, keepdim=True), value=-1)


def to_points(step: Step, temperature: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrix that takes a gradient of the logits to one of the points, `(groups, d, k)`."""
    return (step.old * (2 / temperature)).to(dtype).mT


def to_centroids(total: Tensor, first: Tensor, step: Step, temperature: Tensor) -> Tensor:
    """Gradient of the old centroids, `(groups, k, d)`.

    Args:
        total: sums of the logits' gradient, `(groups, k, 1)`, float64.
        first: sums of it times the points, `(groups, k, d)`, float64.
        step: the iteration.
        temperature: `(groups, 1, 1)`.
    """
    return (first - step.old * total) * (2 / temperature)


def weighted_sum(values: Tensor, weights: Tensor) -> Tensor:
    """Sum values `(groups, k, n)` times weights `(groups, m, n)` over the points, `(groups, k, m)`.

    Products of this shape add up several partial sums; `values @ weights.mT` may add one number after another.
    """
    return torch.bmm(weights, values.mT).mT
