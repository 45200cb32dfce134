"""Soft k-means of few weighted points, each of which stands for many elements of a group.

For scalars the soft weight is a function f of the weight, the same for all weights of a group, and so is the gradient:
`G f′(x) + q(x)`, where q collects what came through the centroids. Centroids and q need only sums over points.
"""

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
        return iterate(start, lambda centroids: self._totals(self._attention(centroids), self.weights), self.scaled)

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
            attended = self._attention(step.old)
            slope = self._back(step, pull, attended, q)
            return slope + self._through_output(step, attended, grads) if last else slope

        attended = self._attention(steps[0].old)
        slope = (attended @ grads.mT).double()
        if implicit:
            slope = slope + self._through_output(steps[0], attended, grads)
            jacobian = mean_jacobian(self.points, attended, self.weights, steps[0]) * (2 / self.scaled.temperature)
            self._back(steps[0], implicit_pull(steps[0], Linearized(slope, jacobian)), attended, q)
        else:
            unroll(steps, slope, back)
        return q

    def _back(self, step: Step, pull: Tensor, attended: Tensor, q: Tensor) -> Tensor:
        """Go back through the means of one step: add to q, return the gradient of the old centroids."""
        logits = through_softmax_(Linear.pull(step, pull, q.dtype).of(self.points), attended)
        q += torch.baddbmm(pull.to(q.dtype).mT @ attended, to_points(step, self.scaled.temperature, q.dtype), logits)
        return to_centroids(*self._totals(logits, self.weights), step, self.scaled.temperature)

    def _through_output(self, step: Step, attended: Tensor, grads: Tensor) -> Tensor:
        """Gradient of the old centroids through the attention of the output."""
        logits = through_softmax_(step.new.to(grads.dtype).expand_as(attended).clone(), attended)
        return to_centroids(*self._totals(logits, grads), step, self.scaled.temperature)

    def _attention(self, centroids: Tensor) -> Tensor:
        return softmax_(Linear.logits(centroids, self.scaled.temperature, self.points.dtype).of(self.points))

    def _totals(self, values: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """Sum values `(groups, k, n)` and them times the points, weighted; float64."""
        return (values @ weights.mT).double(), (values @ (weights * self.points).mT).double()


def output_at(points: Tensor, step: Step, temperature: Tensor) -> tuple[Tensor, Tensor]:
    """Return f and f′ at points `(groups, 1, n)`, of the same shape."""
    values = step.new.to(points.dtype)
    attended = softmax_(Linear.logits(step.old, temperature, points.dtype).of(points))
    logits = through_softmax_(values.expand_as(attended).clone(), attended)
    return values.mT @ attended, to_points(step, temperature, points.dtype) @ logits
