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
    weighted_sum,
)

_ENTRIES = 1 << 17
"""Entries of the attention, groups × clusters × points, that are worked on at a time, and that are kept at most."""


class Nodes:
    """Points and how much each counts.

    Args:
        points: `(groups, 1, n)`, in scaled units and in the arithmetic to use.
        weights: of the same shape.
        scaled: units, temperature and stop rule of the groups.
    """

    def __init__(self, points: Tensor, weights: Tensor, scaled: Scaled) -> None:
        self.points, self.scaled = points, scaled
        self._counted = self._with_moments(weights.to(points.dtype))
        self._kept: list[tuple[Tensor, Tensor]] = []

    def iterate(self, start: Tensor) -> list[Step]:
        """Run the iterations from centroids `(groups, k, 1)`."""
        return iterate(start, self._sums, self.scaled)

    def output(self, step: Step) -> tuple[Tensor, Tensor]:
        """Return f and f′ at the points, of their shape, if the attention is that of this step."""
        f, slopes = torch.empty_like(self.points), torch.empty_like(self.points)
        values = step.new.to(self.points.dtype)
        inward = to_points(step, self.scaled.temperature, self.points.dtype)
        for columns, _, attended in self._attended(step.old):
            torch.bmm(values.mT, attended, out=f[..., columns])
            torch.bmm(inward, _through_output(values, attended), out=slopes[..., columns])
        return f, slopes

    def gradient(self, steps: list[Step], grads: Tensor, implicit: bool) -> Tensor:
        """Return q at the points, `(groups, 1, n)`.

        Args:
            steps: what [`iterate`] returned.
            grads: sums of the output's gradient over what each point stands for, shape of the points.
            implicit: take the gradient of a fixed point.
        """
        grads = self._with_moments(grads.to(self.points.dtype))
        q = torch.zeros_like(self.points)

        def back(step: Step, pull: Tensor, last: bool) -> Tensor:
            return self._back(step, pull, grads if last else None, q)

        slope = torch.zeros_like(steps[0].new)
        for columns, _, attended in self._attended(steps[0].old):
            slope += weighted_sum(attended, grads[:, :1, columns])
        if implicit:
            self._back(steps[0], implicit_pull(steps[0], self._linearize(steps[0], slope, grads)), None, q)
        else:
            unroll(steps, slope, back)
        return q

    def _with_moments(self, weights: Tensor) -> Tensor:
        """Put weights and weights times points together, `(groups, 2, n)`: what all sums over points are of."""
        return torch.cat([weights, weights * self.points], dim=1)

    def _back(self, step: Step, pull: Tensor, grads: Tensor | None, q: Tensor) -> Tensor:
        """Go back through one step, and the output if its gradient is given: add to q, return that of the centroids."""
        temperature, dtype = self.scaled.temperature, q.dtype
        through_mean, inward = Linear.pull(step, pull, dtype), to_points(step, temperature, dtype)
        outward, values = through_mean.slopes.mT, step.new.to(dtype)
        sums = step.old.new_zeros(*step.old.shape[:2], 2)
        for columns, points, attended in self._attended(step.old):
            logits = through_softmax_(through_mean.of(points), attended)
            q[..., columns] += torch.baddbmm(torch.bmm(outward, attended), inward, logits)
            sums += weighted_sum(logits, self._counted[..., columns])
            if grads is not None:
                sums += weighted_sum(_through_output(values, attended), grads[..., columns])
        return to_centroids(sums[..., :1], sums[..., 1:], step, temperature)

    def _linearize(self, step: Step, slope: Tensor, grads: Tensor) -> Linearized:
        """Take derivatives at the last step, as if it had moved nothing."""
        sums = step.old.new_zeros(*step.old.shape[:2], 2)
        jacobian = step.new.new_zeros(*step.new.shape[:2], step.new.shape[1])
        for columns, points, attended in self._attended(step.old):
            sums += weighted_sum(_through_output(step.new.to(points.dtype), attended), grads[..., columns])
            jacobian += mean_jacobian(points, attended, self._counted[:, :1, columns], step)
        slope = slope + to_centroids(sums[..., :1], sums[..., 1:], step, self.scaled.temperature)
        return Linearized(slope, jacobian * (2 / self.scaled.temperature))

    def _sums(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Masses and attention-weighted sums."""
        sums = centroids.new_zeros(*centroids.shape[:2], 2)
        for columns, _, attended in self._attended(centroids):
            sums += weighted_sum(attended, self._counted[..., columns])
        return sums[..., :1], sums[..., 1:]

    def _attended(self, centroids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of the points with their attention `(groups, k, n)`."""
        found = next((attended for known, attended in self._kept if known is centroids), None)
        if found is not None:
            yield slice(None), self.points, found
            return
        logits = Linear.logits(centroids, self.scaled.temperature, self.points.dtype)
        size = max(1, _ENTRIES // centroids.numel())
        for start in range(0, self.points.shape[2], size):
            columns = slice(start, start + size)
            points = self.points[..., columns]
            attended = softmax_(logits.of(points))
            if size >= self.points.shape[2]:
                self._keep(centroids, attended)
            yield columns, points, attended

    def _keep(self, centroids: Tensor, attended: Tensor) -> None:
        """Keep the attention of the latest centroids: what is used again, and the way back begins with it."""
        self._kept = [*self._kept, (centroids, attended)][-(_ENTRIES // attended.numel()) :]


def _through_output(values: Tensor, attended: Tensor) -> Tensor:
    """Return the derivative of the output in the logits, from the centroids as values."""
    return (values - torch.bmm(values.mT, attended)).mul_(attended)
