"""The margin range loss."""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from hf_r2.cells import Cells, cached_pieces, crowded
from hf_r2.grain import Grain, pieces
from hf_r2.losses.l_inf import find_largest
from hf_r2.losses.term import AddGradient, Measure, Measured, range_term
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.stacking import Stacker

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
    return range_term(margin_measure(reduction), Stacker(grain), [weight], [margin])


def margin_measure(reduction: str) -> Measure:
    """Return the routine of a reduction, which takes a weight and its margins; see [`margin`]."""
    if reduction not in MARGIN_REDUCTIONS:
        raise ValueError(f"unknown margin reduction {reduction!r}: use 'max' or 'sum'")
    return partial(_measure, _furthest if reduction == "max" else _all)


def _measure(outside: Measure, weight: LocalWeight, margins: Tensor) -> Routine[Measured]:
    level = weight.held(margins.abs()).to(weight.tensor.device)
    sums, counts, add_gradient = yield from outside(weight, level)
    value = yield from weight.over_groups(level + sums)
    # d|M| is 1, less 1 for every element that counts as outside
    learned = yield from weight.whole(1 - counts)
    return Measured(value, add_gradient, learned.to(margins) * margins.sign())


def _furthest(weight: LocalWeight, level: Tensor) -> Routine[tuple[Tensor, Tensor, AddGradient]]:
    """Take the largest magnitude of each group, if it stands outside."""
    tops, counted, add_gradient = yield from find_largest(weight, level)
    return (tops - level).relu(), counted, add_gradient


def _all(weight: LocalWeight, level: Tensor) -> Routine[tuple[Tensor, Tensor, AddGradient]]:
    """Take every element outside; only the cells that hold one are looked at again, unless they are many."""
    if weight.tiles is not None:
        return _all_of_tiles(weight, level)
    blocks = weight.blocks()
    cells = Cells(blocks, crowded(blocks, level), level)
    yield
    picked = cells.pick(level, above=True)
    found = yield from weight.total(cells.excess(level, picked))
    sums, counts = found.to(blocks[0].dtype).unbind(dim=1)

    def add_gradient(grads: Sequence[Tensor], scale: Tensor | float) -> None:
        scales = weight.per_group(scale).to(level.dtype)
        for batch in picked.cells:
            at = torch.from_numpy(batch.groups)
            signs = _signs_outside(torch.from_numpy(batch.of(blocks)), level[at])
            batch.add(grads, signs.mul_(scales[at, None]).numpy())
        levels, factors = weight.split(level), weight.split(scales)
        for b in picked.whole:
            grad, block, limit, factor = grads[b], blocks[b], levels[b], factors[b]
            if block.is_cpu and len(block) == 1:
                _add_signs_of_one(grad.view(-1), block.view(-1), limit.item(), factor.item())
            else:
                for band, (piece, target) in pieces(block, grad):
                    target.add_(_signs_outside(piece, limit[band]).mul_(factor[band, None]))

    return sums, counts, add_gradient


def _all_of_tiles(weight: LocalWeight, level: Tensor) -> tuple[Tensor, Tensor, AddGradient]:
    level = level.float()
    (sums, counts), outside = weight.tiles.excess(level)

    def add_gradient(grads: Sequence[Tensor], scale: Tensor | float) -> None:
        weight.tiles.add_signs_outside(grads, outside, level, weight.per_group(scale).float())

    return sums.float(), counts.float(), add_gradient


def _signs_outside(values: Tensor, level: Tensor) -> Tensor:
    level = level[:, None]
    return (values - torch.minimum(torch.maximum(values, -level), level)).sign_()


def _add_signs_of_one(grad: Tensor, group: Tensor, level: float, scale: float) -> None:
    buffer, split = cached_pieces(group)
    for piece, target in zip(split, grad.split(len(buffer)), strict=True):
        above = torch._C._nn.softshrink(piece, level, out=buffer[: len(piece)])
        target.add_(above.sign_(), alpha=scale)
