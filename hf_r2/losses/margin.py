"""The margin range loss."""

from functools import partial

import torch
from torch import Tensor

from hf_r2.cells import cached_pieces, cell_peaks, crowded, excess, pick_cells
from hf_r2.grain import Grain, pieces
from hf_r2.losses.l_inf import find_largest
from hf_r2.losses.term import Measure, Measured, range_term
from hf_r2.sharding import LocalWeight, Routine

MARGIN_REDUCTIONS = ("max", "sum")


def margin(weight: Tensor, margin: Tensor, grain: Grain = "tensor", reduction: str = "max") -> Tensor:
    """Learnable margin plus what stands outside it: `Σ_groups [ |M| + reduce_i max(|W_i| − |M|, 0) ]`.

    With `"max"` it behaves like L-infinity down to the margin: weights get gradient only while they stand outside it,
    and M only while nothing does. With `"sum"` (the working definition of margin R2, Kundu et al., arXiv 2303.08253)
    every weight outside gets gradient, and minimised over M it again equals `max|W|`; in practice M overshoots.
    A mean over the elements would drive M to 0 and turn the loss into an L1 penalty, so it is not offered.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        margin: M, one value per group, shape `(groups,)`, in units of the weight.
        grain: the groups whose range is restricted.
        reduction: `"max"` or `"sum"` over the elements of a group.

    Returns:
        Scalar in units of the weight.

    Raises:
        ValueError: for another reduction.
    """
    return range_term(margin_measure(reduction), grain, [weight], [margin])


def margin_measure(reduction: str) -> Measure:
    """Return the routine of a reduction, which takes a weight and its margins; see [`margin`]."""
    if reduction not in MARGIN_REDUCTIONS:
        raise ValueError(f"unknown margin reduction {reduction!r}: use 'max' or 'sum'")
    return partial(_measure, _furthest if reduction == "max" else _all)


def _measure(outside: Measure, weight: LocalWeight, margins: Tensor) -> Routine[Measured]:
    levels = [level.to(weight.tensor.device) for level in weight.held(margins.abs())]
    sums, counts, add_gradient = yield from outside(weight, levels)
    value = yield from weight.over_groups([level + more for level, more in zip(levels, sums, strict=True)])
    # d|M| is 1, less 1 for every element that counts as outside
    learned = yield from weight.whole([1 - count for count in counts])
    return Measured(value, add_gradient, learned.to(margins) * margins.sign())


def _furthest(weight: LocalWeight, levels: list[Tensor]) -> Routine[tuple]:
    """Take the largest magnitude of each group, if it stands outside."""
    tops, add_signs = yield from find_largest(weight)
    sums = [(top - level).relu() for top, level in zip(tops, levels, strict=True)]
    counts = [(more > 0).to(more.dtype) for more in sums]
    return sums, counts, lambda grads, scale: add_signs(grads, [count * scale for count in counts])


def _all(weight: LocalWeight, levels: list[Tensor]) -> Routine[tuple]:
    """Take every element outside; only the cells that hold one are looked at again, unless they are many."""
    peaks = [None if crowded(*pair) else cell_peaks(pair[0]) for pair in zip(weight.blocks(), levels, strict=True)]
    yield
    picked, outside = [], []
    for block, level, peak in zip(weight.blocks(), levels, peaks, strict=True):
        picked.append(None if peak is None else pick_cells(block, peak, level, above=True))
        outside.append(excess(block, level, picked[-1]).T)
    outside = yield from weight.total(outside)
    sums, counts = zip(*(part.to(weight.blocks()[0].dtype).unbind(dim=1) for part in outside), strict=True)

    def add_gradient(grads: list[Tensor], scale: Tensor | float) -> None:
        for grad, block, level, pick in zip(grads, weight.blocks(), levels, picked, strict=True):
            if pick is not None and pick.index.size == 0:
                continue
            if pick is not None:
                signs = _signs_outside(torch.from_numpy(pick.of(block)), level[torch.from_numpy(pick.groups)])
                grad.view(-1, pick.size).index_add_(0, torch.from_numpy(pick.index), signs * scale)
            elif block.is_cpu and len(block) == 1:
                _add_signs_of_one(grad.view(-1), block.view(-1), level.item(), float(scale))
            else:
                for band, (piece, target) in pieces(block, grad):
                    target.add_(_signs_outside(piece, level[band]).mul_(scale))

    return sums, counts, add_gradient


def _signs_outside(values: Tensor, level: Tensor) -> Tensor:
    level = level[:, None]
    return (values - torch.minimum(torch.maximum(values, -level), level)).sign_()


def _add_signs_of_one(grad: Tensor, group: Tensor, level: float, scale: float) -> None:
    buffer, split = cached_pieces(group)
    for piece, target in zip(split, grad.split(len(buffer)), strict=True):
        above = torch._C._nn.softshrink(piece, level, out=buffer[: len(piece)])
        target.add_(above.sign_(), alpha=scale)
