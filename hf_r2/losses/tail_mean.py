"""The tail-mean range loss."""

from functools import partial

import numpy as np
import torch
from torch import Tensor

from hf_r2.cells import as_array
from hf_r2.grain import Grain, pieces
from hf_r2.losses.term import Measure, Measured, range_term
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.stacking import Stacker

SAMPLED = 1 << 14
"""Elements that estimate the level of a tail."""


def tail_mean(weight: Tensor, fraction: float = 0.01, grain: Grain = "tensor") -> Tensor:
    """Mean magnitude of the largest weights: `Σ_groups mean of the ⌈fraction · n⌉ largest |W_i|`.

    The conditional value at risk of |W| (Rockafellar and Uryasev, 2000). It is what the margin loss becomes when its
    sum is divided by `fraction · n` and minimised over the margin; `fraction = 1/n` is L-infinity, `fraction = 1` is
    the mean of |W|. Where several elements tie for the last place in the tail, any of them has it.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        fraction: share of a group's elements in the tail, in (0, 1]; at least one element is.
        grain: the groups whose tail is restricted.

    Returns:
        Scalar in units of the weight.

    Raises:
        ValueError: for a fraction outside (0, 1].
    """
    return range_term(tail_mean_measure(fraction), Stacker(grain), [weight])


def tail_mean_measure(fraction: float) -> Measure:
    """Return the routine of a fraction; see [`tail_mean`]."""
    if not 0 < fraction <= 1:
        raise ValueError(f"tail fraction {fraction} is not in (0, 1]; 0.01 takes the largest 1 % of the weights")
    return partial(_measure, fraction)


def _measure(fraction: float, weight: LocalWeight) -> Routine[Measured]:
    if weight.tiles is not None:
        return (yield from _measure_tiled(fraction, weight))
    sizes = _sizes(fraction, torch.tensor(weight.elements)).int().tolist()
    tails = [_largest(block, size) for block, size in zip(weight.blocks(), sizes, strict=True)]
    candidates = yield from weight.gather([values for values, _ in tails])
    values, shares = [], []
    for (held, _), everywhere, size in zip(tails, candidates, sizes, strict=True):
        # Over processes, each hands in as many as the whole tail has, and the last place may be shared
        tail = everywhere if everywhere.shape[1] == size else everywhere.topk(size, dim=1).values
        last = tail.amin(dim=1, keepdim=True)
        above, ties = (everywhere > last).sum(dim=1, keepdim=True), (everywhere == last).sum(dim=1, keepdim=True)
        values.append((last + (everywhere - last).relu().sum(dim=1, keepdim=True) / size)[:, 0])
        shares.append(((held > last) + (held == last) * (size - above) / ties).to(held.dtype) / size)
    value = yield from weight.over_groups(torch.cat(values))

    def add_gradient(grads: list[Tensor], scale: Tensor | float) -> None:
        scales = weight.split(weight.per_group(scale))
        for block, grad, (_, positions), share, factor in zip(
            weight.blocks(), grads, tails, shares, scales, strict=True
        ):
            share = share[:, : positions.shape[1]] * factor[:, None].to(share.dtype)
            grad.scatter_add_(1, positions, block.gather(1, positions).sign() * share)

    return Measured(value, add_gradient)


def _measure_tiled(fraction: float, weight: LocalWeight) -> Routine[Measured]:
    """Share the last places among all that tie for them."""
    size = _sizes(fraction, weight.tiles.elements)
    level, reached = weight.tiles.level_of(size)
    (sums, above), _ = weight.tiles.excess(level)
    share = (size - above) / (reached - above)
    value = yield from weight.over_groups((level + sums / size).float())

    def add_gradient(grads: list[Tensor], scale: Tensor | float) -> None:
        scales = weight.per_group(scale) / size
        weight.tiles.add_signs_from(grads, level, scales.float(), (scales * share).float())

    return Measured(value, add_gradient)


def _sizes(fraction: float, elements: Tensor) -> Tensor:
    """Count the elements in the tails of groups of so many."""
    # 0.07 · 100 is 7.000000000000001 in floating point: a hair above a whole number is that number
    return (fraction * elements.double() * (1 - 1e-9)).ceil().clamp_min(1)


def _largest(block: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Values `(groups, count)` and positions of the largest magnitudes held here; values of −1 for what is missing."""
    if block.is_cpu and len(block) == 1 and block.shape[1] > SAMPLED and 4 * count < block.shape[1]:
        # A selection over all elements takes ten passes' time. A sample tells a level that about twice as many exceed
        sample = block[0, :: block.shape[1] // SAMPLED].abs()
        level = sample.topk(2 * count * len(sample) // block.shape[1] + 8).values[-1]
        found, start = [], 0
        for _, (piece,) in pieces(block):
            # Not `>= level`: NaN is found too, and taken for the largest
            found.append(start + np.flatnonzero(~(np.abs(as_array(piece)) < level.item())))
            start += piece.numel()
        near = torch.from_numpy(np.concatenate(found))
        if len(near) >= count:
            values, chosen = block.view(-1).index_select(0, near).abs_().topk(count, sorted=False)
            return values[None], near[chosen][None]
    values, positions = block.abs().topk(min(count, block.shape[1]), dim=1, sorted=False)
    return torch.nn.functional.pad(values, (0, count - values.shape[1]), value=-1), positions
