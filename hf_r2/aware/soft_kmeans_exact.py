"""Soft k-means by passes over all elements, piece by piece.

The attention of every piece is computed anew in each pass, forward and backward, so that only the weight and one set of
centroids per iteration are kept.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

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

_CPU_ENTRIES, _DEVICE_ENTRIES = 1 << 17, 1 << 26
"""Entries of a piece's attention: what stays in a core's cache, and what fills a device."""

_COPIES = 5
"""Arrays of the size of a piece's attention that are alive at a time, points included."""


class ExactSoftKMeans(torch.autograd.Function):
    """Soft weights and last centroids of a block; see [`hf_r2.aware.soft_kmeans.soft_kmeans`]."""

    @staticmethod
    def forward(ctx: Any, block: Tensor, start: Tensor, scaled: Scaled, implicit: bool, memory: int) -> tuple:
        """Take a block `(groups, n)` and start centroids `(groups, k, d)` in scaled units, float64."""
        output = torch.empty(block.shape, dtype=block.dtype, device=block.device)
        centroids, masses = torch.empty_like(start), torch.empty_like(start[:, :, :1])
        ctx.scaled, ctx.implicit, ctx.memory, ctx.steps = scaled, implicit, memory, []
        for groups, band in _bands(block, start, scaled, memory):
            steps = iterate(start[groups], band.sums, band.scaled)
            band.write_output(steps[0], output[groups])
            centroids[groups], masses[groups] = steps[0].new, steps[0].mass
            ctx.steps.append(steps)
        ctx.save_for_backward(block, start)
        ctx.mark_non_differentiable(centroids, masses)
        return output, centroids, masses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple:
        """Return the gradient of the block."""
        block, start = ctx.saved_tensors
        result = torch.empty(block.shape, dtype=block.dtype, device=block.device)
        for (groups, band), steps in zip(_bands(block, start, ctx.scaled, ctx.memory), ctx.steps, strict=True):
            result[groups] = band.gradient(steps, grad[groups], ctx.implicit)
        return result, None, None, None, None


def _bands(block: Tensor, start: Tensor, scaled: Scaled, memory: int) -> Iterator[tuple[slice, "_Band"]]:
    """Cut a block into bands of groups that are small enough, or single groups."""
    k, d = start.shape[1:]
    widest = scaled.arithmetic(block)
    most = _CPU_ENTRIES * torch.get_num_threads() if block.is_cpu else _DEVICE_ENTRIES
    entries = min(most, memory // (_COPIES * widest.itemsize))
    rows = max(1, entries // (-(-block.shape[1] // d) * k))
    for first in range(0, len(block), rows):
        groups = slice(first, first + rows)
        own = scaled.of(groups)
        yield groups, _Band(block[groups], d, own, own.arithmetic(block), entries // k)


class _Band:
    """Some groups, all of whose passes are done before the next ones come."""

    def __init__(self, block: Tensor, d: int, scaled: Scaled, dtype: torch.dtype, points: int) -> None:
        self.block, self.d, self.scaled, self.dtype = block, d, scaled, dtype
        self.vectors = -(-block.shape[1] // d)
        self.size = max(1, points // len(block))
        self._kept: tuple[Tensor, tuple[slice, Tensor, Tensor]] | None = None

    def attended(self, centroids: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yield slices of columns with their points `(groups, d, n)` and attention `(groups, k, n)`."""
        if self._kept is not None and self._kept[0] is centroids:
            yield self._kept[1]
            return
        self._kept = None
        logits = Linear.logits(centroids, self.scaled.temperature, self.dtype)
        for start in range(0, self.vectors, self.size):
            columns = slice(start * self.d, min((start + self.size) * self.d, self.block.shape[1]))
            points = self._points(columns)
            found = columns, points, softmax_(logits.of(points))
            if self.size >= self.vectors:
                self._kept = centroids, found
            yield found

    def _points(self, columns: slice) -> Tensor:
        """Cut columns into points `(groups, d, n)`, contiguous: sums over n take a quarter of the time then."""
        vectors = self._vectors(self.block, columns, completed=True).mT
        points = torch.empty(vectors.shape, dtype=self.dtype, device=vectors.device)
        centre, per_scale = (each.to(self.dtype) for each in (self.scaled.centre, 1 / self.scaled.scale))
        return torch.sub(vectors, centre, out=points).mul_(per_scale)

    def _vectors(self, values: Tensor, columns: slice, completed: bool) -> Tensor:
        """Cut columns into vectors `(groups, n, d)`; the last is completed with the first elements, or with zeros."""
        part = values[:, columns].to(self.dtype)
        missing = -part.shape[1] % self.d
        if missing:
            first = torch.arange(missing, device=values.device) % values.shape[1]
            fill = values[:, first].to(self.dtype) if completed else part.new_zeros(len(part), missing)
            part = torch.cat([part, fill], dim=1)
        return part.reshape(len(part), -1, self.d)

    def sums(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Masses and attention-weighted sums; see [`iterate`]."""
        mass, first = centroids.new_zeros(*centroids.shape[:2], 1), torch.zeros_like(centroids)
        for _, points, attended in self.attended(centroids):
            mass += attended.sum(dim=2, keepdim=True)
            first += weighted_sum(attended, points)
        return mass, first

    def write_output(self, step: Step, output: Tensor) -> None:
        """Write the soft weights under the last step."""
        values = step.new.to(self.dtype).mT
        for columns, _, attended in self.attended(step.old):
            output[:, columns] = _elements(self.scaled.outward(values @ attended), columns.stop - columns.start)

    def gradient(self, steps: list[Step], grad: Tensor, implicit: bool) -> Tensor:
        """Return the block's gradient from the output's, in the arithmetic of the band."""
        target = torch.zeros(grad.shape, dtype=self.dtype, device=grad.device)

        def back(step: Step, pull: Tensor, last: bool) -> Tensor:
            return self.back(step, pull, grad if last else None, target)

        if implicit:
            back(steps[0], implicit_pull(steps[0], self.linearize(steps[0], grad)), True)
        else:
            unroll(steps, self.slope(steps[0], grad), back)
        return target

    def slope(self, step: Step, grad: Tensor) -> Tensor:
        """Return the gradient of the last centroids as values of the output."""
        slope = torch.zeros_like(step.new)
        for columns, _, attended in self.attended(step.old):
            slope += weighted_sum(attended, self._vectors(grad, columns, completed=False).mT)
        return slope

    def back(self, step: Step, pull: Tensor, grad: Tensor | None, target: Tensor) -> Tensor:
        """Go back through one step.

        Args:
            step: the iteration.
            pull: gradient of the new centroids over the masses.
            grad: gradient of the output, for the step that it was computed from.
            target: the block's gradient, to which this adds.

        Returns:
            Gradient of the old centroids.
        """
        temperature, dtype = self.scaled.temperature, self.dtype
        through_mean, values, slopes = Linear.pull(step, pull, dtype), step.new.to(dtype), pull.to(dtype).mT
        inward = to_points(step, temperature, dtype)
        total, first = torch.zeros_like(step.mass), torch.zeros_like(step.old)
        for columns, points, attended in self.attended(step.old):
            logits = through_mean.of(points)
            if grad is not None:
                logits.baddbmm_(values, self._vectors(grad, columns, completed=False).mT)
            through_softmax_(logits, attended)
            total += logits.sum(dim=2, keepdim=True)
            first += weighted_sum(logits, points)
            _add_elements(target[:, columns], torch.baddbmm(slopes @ attended, inward, logits))
        return to_centroids(total, first, step, temperature)

    def linearize(self, step: Step, grad: Tensor) -> Linearized:
        """Take derivatives at the last step, as if it had moved nothing; scalars only."""
        values, jacobian = step.new.to(self.dtype), step.new.new_zeros(*step.new.shape[:2], step.new.shape[1])
        total, first = torch.zeros_like(step.mass), torch.zeros_like(step.old)
        for columns, points, attended in self.attended(step.old):
            logits = through_softmax_(values * self._vectors(grad, columns, completed=False).mT, attended)
            total += logits.sum(dim=2, keepdim=True)
            first += weighted_sum(logits, points)
            jacobian += mean_jacobian(points, attended, None, step)
        slope = self.slope(step, grad) + to_centroids(total, first, step, self.scaled.temperature)
        return Linearized(slope, jacobian * (2 / self.scaled.temperature))


def _elements(vectors: Tensor, count: int) -> Tensor:
    """Lay vectors `(groups, d, n)` side by side again, without what completed the last."""
    return vectors.mT.flatten(1)[:, :count]


def _add_elements(target: Tensor, vectors: Tensor) -> None:
    if target.shape[1] == vectors.shape[1] * vectors.shape[2]:
        target.view(len(target), -1, vectors.shape[1]).mT.add_(vectors)
    else:
        target += _elements(vectors, target.shape[1])
