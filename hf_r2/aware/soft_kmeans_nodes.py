"""Soft k-means of few weighted points, each of which stands for many elements of a group.

For scalars the soft weight is a function f of the weight, the same for all weights of a group, and so is the gradient:
`G f′(x) + q(x)`, where q collects what came through the centroids. Centroids and q need only sums over points.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_implicit import Linearized, implicit_pull, mean_jacobian
from hf_r2.aware.soft_kmeans_steps import (
    Linear,
    Scaled,
    Step,
    iterate,
    softmax_,
    through_softmax_,
    to_centroids,
    to_points,
    unroll,
)

_ENTRIES = 1 << 17
"""Entries of the attention, groups × clusters × points, that are worked on at a time."""


class Nodes:
    """Points and how much each counts.

    Args:
        points: `(groups, 1, n)`, in scaled units and in the arithmetic to use.
        weights: of the same shape.
        scaled: units, temperature and stop rule of the groups.
    """

    def __init__(self, points: Tensor, weights: Tensor, scaled: Scaled) -> None:
        self.points, self.scaled = points, scaled
        self.weights = weights.to(points.dtype)

    def iterate(self, start: Tensor) -> list[Step]:
        """Run the iterations from centroids `(groups, k, 1)`."""
        return iterate(start, self._sums, self.scaled)

    def gradient(self, steps: list[Step], grads: Tensor, implicit: bool) -> Tensor:
        """Return q at the points, `(groups, 1, n)`.

        Args:
            steps: what [`iterate`] returned.
            grads: sums of the output's gradient over what each point stands for, shape of the points.
            implicit: take the gradient of a fixed point.
        """
        grads = grads.to(self.points.dtype)
        q = torch.zeros_like(self.points)

        def back(step: Step, pull: Tensor, last: bool) -> Tensor:
            return self._back(step, pull, grads if last else None, q)

        slope = torch.zeros_like(steps[0].new)
        for columns, _, attended in self._attended(steps[0].old):
            slope += attended @ grads[..., columns].mT
        if implicit:
            self._back(steps[0], implicit_pull(steps[0], self._linearize(steps[0], slope, grads)), None, q)
        else:
            unroll(steps, slope, back)
        return q

    def _back(self, step: Step, pull: Tensor, grads: Tensor | None, q: Tensor) -> Tensor:
        """Go back through one step, and the output if its gradient is given: add to q, return that of the centroids."""
        temperature, dtype = self.scaled.temperature, q.dtype
        through_mean, inward, outward = (
            Linear.pull(step, pull, dtype),
            to_points(step, temperature, dtype),
            pull.to(dtype),
        )
        total, first = torch.zeros_like(step.mass), torch.zeros_like(step.old)
        for columns, points, attended in self._attended(step.old):
            logits = through_softmax_(through_mean.of(points), attended)
            q[..., columns] += torch.baddbmm(outward.mT @ attended, inward, logits)
            _add(total, first, logits, points, self.weights[..., columns])
            if grads is not None:
                _add(total, first, _through_output(step, attended), points, grads[..., columns])
        return to_centroids(total, first, step, temperature)

    def _linearize(self, step: Step, slope: Tensor, grads: Tensor) -> Linearized:
        """Take derivatives at the last step, as if it had moved nothing."""
        total, first = torch.zeros_like(step.mass), torch.zeros_like(step.old)
        jacobian = step.new.new_zeros(*step.new.shape[:2], step.new.shape[1])
        for columns, points, attended in self._attended(step.old):
            _add(total, first, _through_output(step, attended), points, grads[..., columns])
            jacobian += mean_jacobian(points, attended, self.weights[..., columns], step)
        slope = slope + to_centroids(total, first, step, self.scaled.temperature)
        return Linearized(slope, jacobian * (2 / self.scaled.temperature))

    def _sums(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Masses and attention-weighted sums."""
        mass, first = torch.zeros_like(centroids), torch.zeros_like(centroids)
        for columns, points, attended in self._attended(centroids):
            _add(mass, first, attended, points, self.weights[..., columns])
        return mass, first

    def _attended(self, centroids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of the points with their attention `(groups, k, n)`."""
        logits = Linear.logits(centroids, self.scaled.temperature, self.points.dtype)
        size = max(1, _ENTRIES // centroids.numel())
        for start in range(0, self.points.shape[2], size):
            columns = slice(start, start + size)
            points = self.points[..., columns]
            yield columns, points, softmax_(logits.of(points))


def _add(total: Tensor, first: Tensor, values: Tensor, points: Tensor, weights: Tensor) -> None:
    """Add weighted sums of values `(groups, k, n)`, and of them times the points."""
    total += values @ weights.mT
    first += values @ (weights * points).mT


def _through_output(step: Step, attended: Tensor) -> Tensor:
    """Return the derivative of the output in the logits."""
    return through_softmax_(step.new.to(attended.dtype).expand_as(attended).clone(), attended)


def output_at(points: Tensor, step: Step, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and f′ at points `(groups, 1, n)`, of the same shape."""
    values = step.new.to(points.dtype)
    logits, inward = Linear.logits(step.old, temperature, points.dtype), to_points(step, temperature, points.dtype)
    f, slopes = torch.empty_like(points), torch.empty_like(points)
    size = max(1, _ENTRIES // step.new.numel())
    for part, value, slope in zip(*(each.split(size, dim=2) for each in (points, f, slopes)), strict=True):
        attended = softmax_(logits.of(part))
        value.copy_(values.mT @ attended)
        slope.copy_(inward @ _through_output(step, attended))
    return f, slopes
