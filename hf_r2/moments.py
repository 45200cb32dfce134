"""Statistics of the groups of a weight, as routines over what each process holds (see `hf_r2.sharding`)."""

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.cells import CELL, cell_size
from hf_r2.fusing import fused
from hf_r2.grain import pieces
from hf_r2.sharding import LocalWeight, Routine, run


def rms(weight: LocalWeight) -> Routine[Tensor]:
    """Root mean square of each group: `(groups,)`."""
    if weight.tiles is not None:
        return _extremes_and_rms_of_tiles(weight)[1]
    return (yield from _rms(weight, [_norm(block) for block in weight.blocks()]))


def extremes(weight: LocalWeight) -> Routine[Tensor]:
    """Largest and smallest element of each group: `(groups, 2)`."""
    if weight.tiles is not None:
        return _extremes_and_rms_of_tiles(weight)[0]
    return (yield from _extremes(weight, [_ends(block) for block in weight.blocks()]))


def extremes_and_rms(weight: LocalWeight, compiled: bool) -> Routine[tuple[Tensor, Tensor]]:
    """Measure what [`extremes`] and [`rms`] do; compiled, in one pass on a CPU, fused with `torch.compile`."""
    if weight.tiles is not None:
        return _extremes_and_rms_of_tiles(weight)
    blocks = weight.blocks()
    if compiled and blocks[0].is_cpu:
        ends, norms = zip(*map(_ends_and_norm, blocks), strict=True)
    else:
        ends, norms = map(_ends, blocks), map(_norm, blocks)
    bounds = yield from _extremes(weight, list(ends))
    return bounds, (yield from _rms(weight, list(norms)))


def _extremes_and_rms_of_tiles(weight: LocalWeight) -> tuple[Tensor, Tensor]:
    high, low, squares = weight.tiles.ends_and_squares()
    return torch.stack([high, -low], dim=1).float(), (squares / weight.group_elements).sqrt().float()


def _extremes(weight: LocalWeight, ends: list[Tensor]) -> Routine[Tensor]:
    high, low = (yield from weight.maximum(torch.cat(ends))).unbind(dim=1)
    return torch.stack([high, -low], dim=1)


def _rms(weight: LocalWeight, norms: list[Tensor]) -> Routine[Tensor]:
    squares = yield from weight.total(torch.cat(norms).square())
    return (squares / weight.group_elements).sqrt().to(weight.blocks()[0].dtype)


def _ends(block: Tensor) -> Tensor:
    """Largest element of each group, and the smallest with its sign turned: `(groups, 2)`."""
    if not block.shape[1]:
        return block.new_full((len(block), 2), -torch.inf)
    if len(block) == 1 and block.is_cpu:
        low, high = block.aminmax()  # one pass, where amax and amin take two
        return torch.stack([high, low.neg()])[None]
    return torch.stack([block.amax(dim=1), block.amin(dim=1).neg_()], dim=1)


def _norm(block: Tensor) -> Tensor:
    """Euclidean norm of each group, in float64."""
    if block.is_cpu and block.numel():
        # Three times as fast as float64: cells in float32, whose few elements lose nothing, then these in float64
        cells = torch.linalg.vector_norm(block.view(len(block), -1, cell_size(block.shape[1])), dim=2)
        norm = torch.linalg.vector_norm(cells, dim=1, dtype=torch.float64)
        if _within_float32(norm):
            return norm
    return torch.linalg.vector_norm(block, dim=1, dtype=torch.float64)


def _within_float32(norm: Tensor) -> bool:
    """Tell whether the squares are: those of very large and very small weights are not."""
    return bool(((norm > 1e-15) & (norm < 1e15)).all())


def _ends_and_norm(block: Tensor) -> tuple[Tensor, Tensor]:
    if block.numel():
        high, low, squares = fused(_cell_moments)(block.view(len(block), -1, cell_size(block.shape[1], 4 * CELL)))
        norm = squares.sum(dim=1, dtype=torch.float64).sqrt()
        if _within_float32(norm):
            return torch.stack([high.amax(dim=1), low.amin(dim=1).neg_()], dim=1), norm
    return _ends(block), _norm(block)


def _cell_moments(cells: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and smallest elements and sums of squares of the cells of a block, `(groups, cells, elements)`."""
    return cells.amax(dim=2), cells.amin(dim=2), cells.square().sum(dim=2)


def require_finite(names: Iterable[str], values: Iterable[Tensor]) -> None:
    """Raise a ValueError that names the weights for which a value computed from all elements is not finite."""
    broken = [name for name, value in zip(names, values, strict=True) if not bool(value.isfinite().all())]
    if broken:
        more = f" and {len(broken) - 3} more" if len(broken) > 3 else ""
        raise ValueError(
            f"{', '.join(broken[:3])}{more}: NaN or infinite values. Training has diverged: go back to an earlier "
            "checkpoint, with a lower learning rate or strength"
        )


class Shape(NamedTuple):
    """How the values of a whole weight are distributed; scalars, dimensionless.

    Args:
        crest_factor: max|W| / rms(W); 0 for a weight of zeros.
        kurtosis: fourth moment over the squared second, around the mean; 0 for equal values.
    """

    crest_factor: Tensor
    kurtosis: Tensor


def shapes(weights: Iterable[Tensor]) -> list[Shape]:
    """Measure crest factor and kurtosis of whole weights, tensors or DTensors."""
    with torch.no_grad():
        return run([shape(LocalWeight(weight, "tensor")) for weight in weights])


def shape(weight: LocalWeight) -> Routine[Shape]:
    """Measure crest factor and kurtosis of a weight cut with grain "tensor"; NaN for a weight that is not finite."""
    ends = yield from extremes(weight)
    largest = ends.abs().amax(dim=1)
    (block,) = weight.blocks()
    # Divided by the largest magnitude, the fourth powers of no weight leave float32
    unit = 1 / torch.where(largest != 0, largest, 1).double()
    sums = torch.zeros(1, 4, dtype=torch.float64, device=block.device)
    for _, (piece,) in pieces(block):
        values = piece * unit.to(piece.dtype)
        squares = values.square()
        powers = (values, squares, values * squares, squares.square())
        sums += torch.stack([power.sum(dim=1, dtype=torch.float64) for power in powers], dim=1)
    sums = yield from weight.total(sums)
    m1, m2, m3, m4 = (sums / weight.elements[0])[0]
    variance = m2 - m1**2
    # Moments around the mean from those around zero; weights have means near zero, so little cancels
    fourth = m4 - 4 * m1 * m3 + 6 * m1**2 * m2 - 3 * m1**4
    crest = torch.where(largest[0] != 0, (largest[0].double() * unit[0]) / m2.sqrt(), 0)
    # Equal values leave no variance but rounding
    kurtosis = torch.where(variance > 1e-12 * m2, fourth / variance.square(), 0)
    return Shape(crest.float(), torch.where(m2.isnan(), m2, kurtosis).float())
