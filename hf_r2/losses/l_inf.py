"""The L-infinity range loss."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.cells import cell_peaks, pick_cells
from hf_r2.grain import Grain
from hf_r2.losses.term import Measured, range_term
from hf_r2.sharding import LocalWeight, Routine


def l_inf(weight: Tensor, grain: Grain = "tensor") -> Tensor:
    """Sum of the largest magnitudes: `Σ_groups max|W|`.

    The subgradient is `sign(W)` on the largest element of each group (shared between ties) and zero elsewhere, whatever
    the size of the weight. Source: L_inf R2 of Kundu et al., arXiv 2303.08253, in this project's working definition.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        grain: the groups whose range is restricted.

    Returns:
        Scalar in units of the weight.
    """
    return range_term(measure_l_inf, grain, [weight])


def measure_l_inf(weight: LocalWeight) -> Routine[Measured]:
    """Measure L-infinity; see [`l_inf`]."""
    tops, add_signs = yield from find_largest(weight)
    value = yield from weight.over_groups(tops)
    return Measured(value, lambda grads, scale: add_signs(grads, [scale] * len(grads)))


AddSigns = Callable[[Sequence[Tensor], Sequence[Tensor | float]], None]


def find_largest(weight: LocalWeight) -> Routine[tuple[list[Tensor], AddSigns]]:
    """Find the largest magnitude of each group and the elements that have it.

    Returns:
        The largest magnitudes, `(groups,)` per block; and a function that adds scale × `sign(W)` on the largest
        elements of each group, shared between ties, to blocks in place, with one scale per block: a number, or one per
        group.
    """
    peaks = [cell_peaks(block) for block in weight.blocks()]
    yield
    tops = yield from weight.maximum([peak.amax(dim=1) for peak in peaks])
    found, counts = [], []
    for block, peak, top in zip(weight.blocks(), peaks, tops, strict=True):
        found.append(_look(block, peak, top))
        counts.append(found[-1].counts(top) if found[-1] else _is_largest(block, top).sum(dim=1, dtype=top.dtype))
    counts = yield from weight.total(counts)

    def add_signs(grads: Sequence[Tensor], scales: Sequence[Tensor | float]) -> None:
        for index, (grad, largest, count, scale) in enumerate(zip(grads, found, counts, scales, strict=True)):
            if largest:
                largest.add_signs(grad, count, scale)
            else:
                block, share = weight.blocks()[index], scale / count.clamp_min(1)
                grad.addcmul_(block.sign(), _is_largest(block, tops[index]) * share[:, None])

    return tops, add_signs


class _Largest(NamedTuple):
    """Where a block has its groups' largest magnitudes: flat positions, their signs and groups."""

    positions: np.ndarray
    signs: np.ndarray
    groups: np.ndarray

    def counts(self, top: Tensor) -> Tensor:
        """Count them by group."""
        return torch.from_numpy(np.bincount(self.groups, minlength=len(top)).astype(self.signs.dtype))

    def add_signs(self, grad: Tensor, count: Tensor, scale: Tensor | float) -> None:
        """Add scale × sign, shared between as many as there are in the group everywhere, to a block."""
        share = (scale.numpy() if isinstance(scale, Tensor) else scale) / np.maximum(count.numpy(), 1)
        values = (self.signs * share[self.groups]).astype(self.signs.dtype, copy=False)
        grad.view(-1).index_add_(0, torch.from_numpy(self.positions), torch.from_numpy(values))


def _look(block: Tensor, peaks: Tensor, top: Tensor) -> _Largest | None:
    """Look for the largest magnitudes in the cells that hold them; see [`pick_cells`]."""
    picked = pick_cells(block, peaks, top)
    if picked is None:
        return None
    cells = picked.of(block)
    cell, column = (np.abs(cells) == top.numpy()[picked.groups, None]).nonzero()
    positions = picked.index[cell] * picked.size + column
    return _Largest(positions, np.sign(cells[cell, column]), picked.groups[cell])


def _is_largest(block: Tensor, top: Tensor) -> Tensor:
    return block.abs() == top[:, None]
