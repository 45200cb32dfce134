"""Soft k-means by passes over all elements, piece by piece.

The attention of every piece is computed anew in each pass, forward and backward, so that only the weight and one set of
centroids per iteration are kept.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

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

_LEAST, _MOST, _DEVICE = 1 << 19, 1 << 21, 1 << 28
"""Numbers in the temporaries of a piece: on a CPU three quarters of the block's elements, but no fewer than repay
the calls, and no more than stay near a core; on a device what fills it."""

_PER_CLUSTER, _PER_DIMENSION = 3, 4
"""Numbers that are alive at a time for every point: for each cluster, and for each dimension and one more."""


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
            band.write_gradient(steps, grad[groups], ctx.implicit, result[groups])
        return result, None, None, None, None


def _bands(block: Tensor, start: Tensor, scaled: Scaled, memory: int) -> Iterator[tuple[slice, "_Band"]]:
    """Cut a block into bands of groups that are small enough, or single groups."""
    k, d = start.shape[1:]
    widest = scaled.arithmetic(block)
    numbers = min(max(_LEAST, 3 * block.numel() // 4), _MOST) if block.is_cpu else _DEVICE
    numbers = min(numbers, memory // widest.itemsize)
    points = max(1, numbers // (_PER_CLUSTER * k + _PER_DIMENSION * (d + 1)))
    rows = max(1, points // -(-block.shape[1] // d))
    for first in range(0, len(block), rows):
        groups = slice(first, first + rows)
        own = scaled.of(groups)
        yield groups, _Band(block[groups], d, own, own.arithmetic(block), points)


class _Piece(NamedTuple):
    """Some columns of a band under some centroids.

    Args:
        columns: of the block.
        points: `(groups, d + 1, n)` in scaled units, followed by 1.
        attended: `(groups, k, n)`.
    """

    columns: slice
    points: Tensor
    attended: Tensor


class _Band:
    """Some groups, all of whose passes are done before the next ones come."""

    def __init__(self, block: Tensor, d: int, scaled: Scaled, dtype: torch.dtype, points: int) -> None:
        self.block, self.d, self.scaled, self.dtype = block, d, scaled, dtype
        self.vectors = -(-block.shape[1] // d)
        self.size = max(1, points // len(block))
        self._kept: tuple[Tensor, _Piece] | None = None

    def attended(self, centroids: Tensor) -> Iterator[_Piece]:
        """Walk over the columns. Where one piece is all of them, it is kept, and its points for other centroids."""
        if self._kept is not None and self._kept[0] is centroids:
            yield self._kept[1]
            return
        logits = Linear.logits(centroids, self.scaled.temperature, self.dtype)
        for start in range(0, self.vectors, self.size):
            columns = slice(start * self.d, min((start + self.size) * self.d, self.block.shape[1]))
            points, self._kept = self._points(columns) if self._kept is None else self._kept[1].points, None
            piece = _Piece(columns, points, softmax_(logits.of(points[:, : self.d])))
            if self.size >= self.vectors:
                self._kept = centroids, piece
            yield piece

    def _points(self, columns: slice) -> Tensor:
        """Cut columns into points followed by 1, `(groups, d + 1, n)`, contiguous: sums take a quarter of the time."""
        vectors = self._vectors(self.block, columns, completed=True)
        points = torch.ones(len(vectors), self.d + 1, vectors.shape[2], dtype=self.dtype, device=vectors.device)
        torch.sub(vectors, self.scaled.centre.to(self.dtype), out=points[:, : self.d])
        points[:, : self.d] *= (1 / self.scaled.scale).to(self.dtype)
        return points

    def _vectors(self, values: Tensor, columns: slice, completed: bool) -> Tensor:
        """Cut columns into vectors `(groups, d, n)`; the last is completed with the first elements, or with zeros."""
        part = values[:, columns].to(self.dtype)
        missing = -part.shape[1] % self.d
        if missing:
            first = torch.arange(missing, device=values.device) % values.shape[1]
            fill = values[:, first].to(self.dtype) if completed else part.new_zeros(len(part), missing)
            part = torch.cat([part, fill], dim=1)
        return part.reshape(len(part), -1, self.d).mT

    def sums(self, centroids: Tensor) -> tuple[Tensor, Tensor]:
        """Masses and attention-weighted sums; see [`iterate`]."""
        sums = centroids.new_zeros(*centroids.shape[:2], self.d + 1)
        for _, points, attended in self.attended(centroids):
            sums += weighted_sum(attended, points)
        return sums[..., self.d :], sums[..., : self.d]

    def write_output(self, step: Step, output: Tensor) -> None:
        """Write the soft weights under the last step."""
        values = step.new.to(self.dtype).mT
        for columns, _, attended in self.attended(step.old):
            means = torch.bmm(values, attended)
            output[:, columns] = _elements(self.scaled.outward(means), columns.stop - columns.start)

    def write_gradient(self, steps: list[Step], grad: Tensor, implicit: bool, result: Tensor) -> None:
        """Write the block's gradient from the output's; it is summed in the arithmetic of the band."""
        target = result.zero_() if result.dtype == self.dtype else torch.zeros_like(result, dtype=self.dtype)

        def back(step: Step, pull: Tensor, last: bool) -> Tensor:
            return self.back(step, pull, grad if last else None, target)

        if implicit:
            back(steps[0], implicit_pull(steps[0], self.linearize(steps[0], grad)), True)
        else:
            unroll(steps, self.slope(steps[0], grad), back)
        if target is not result:
            result.copy_(target)

    def slope(self, step: Step, grad: Tensor) -> Tensor:
        """Return the gradient of the last centroids as values of the output."""
        slope = torch.zeros_like(step.new)
        for columns, _, attended in self.attended(step.old):
            slope += weighted_sum(attended, self._vectors(grad, columns, completed=False))
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
        through_mean, values = Linear.pull(step, pull, dtype), step.new.to(dtype)
        outward, inward = through_mean.slopes.mT, to_points(step, temperature, dtype)
        sums = step.old.new_zeros(*step.old.shape[:2], self.d + 1)
        for columns, points, attended in self.attended(step.old):
            logits = through_mean.of(points[:, : self.d])
            if grad is not None:
                logits.baddbmm_(values, self._vectors(grad, columns, completed=False))
            through_softmax_(logits, attended)
            sums += weighted_sum(logits, points)
            _add_elements(target[:, columns], torch.bmm(outward, attended).baddbmm_(inward, logits))
        return to_centroids(sums[..., self.d :], sums[..., : self.d], step, temperature)

    def linearize(self, step: Step, grad: Tensor) -> Linearized:
        """Take derivatives at the last step, as if it had moved nothing; scalars only."""
        values, jacobian = step.new.to(self.dtype), step.new.new_zeros(*step.new.shape[:2], step.new.shape[1])
        sums = step.old.new_zeros(*step.old.shape[:2], 2)
        for columns, points, attended in self.attended(step.old):
            logits = through_softmax_(values * self._vectors(grad, columns, completed=False), attended)
            sums += weighted_sum(logits, points)
            jacobian += mean_jacobian(points[:, :1], attended, None, step)
        slope = self.slope(step, grad) + to_centroids(sums[..., 1:], sums[..., :1], step, self.scaled.temperature)
        return Linearized(slope, jacobian * (2 / self.scaled.temperature))


def _elements(vectors: Tensor, count: int) -> Tensor:
    """Lay vectors `(groups, d, n)` side by side again, without what completed the last."""
    return vectors.mT.flatten(1)[:, :count]


def _add_elements(target: Tensor, vectors: Tensor) -> None:
    if target.shape[1] == vectors.shape[1] * vectors.shape[2]:
        target.view(len(target), -1, vectors.shape[1]).mT.add_(vectors)
    else:
        target += _elements(vectors, target.shape[1])
