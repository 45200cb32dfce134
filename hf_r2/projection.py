"""Range restriction decoupled from the loss, as AdamW decouples weight decay."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_r2.cells import CELL, Cells, Picked, crowded, excess, excess_of_one, sample_magnitudes
from hf_r2.grain import Grain, parse_grain, pieces
from hf_r2.moments import require_finite, rms
from hf_r2.selection import current_weights, scaled, select_trainable
from hf_r2.sharding import LocalWeight, Routine, run
from hf_r2.stacking import Stack, Stacker
from hf_r2.tiles import Recorded

PROJECTIONS = ("prox", "clip")

NEWTON_STEPS = 24
"""At most; weights take two to five."""

SAMPLED_CELLS, SAMPLED_SHARE = 128, 128
"""Cells of a weight that is sampled, at least, and the share of all of them, 1 / 128, if that is more."""


class Limits(NamedTuple):
    """What the magnitudes of a weight's groups are limited to.

    Args:
        level: `(groups,)`.
        picked: what holds all elements above it.
    """

    level: Tensor
    picked: Picked


class RangeProjection:
    """Pulls the selected weights back inside a range after every optimizer step.

        projection = RangeProjection(model, kind="clip", clip=1.5)
        …
        optimizer.step()
        projection.step()

    `"clip"` limits |W| to a multiple of the weight's rms; `"prox"` takes the proximal step of `t · ‖W‖_inf`, whose pull
    does not depend on the optimizer. Only the selected weights change: no bias, norm or optimizer state does. Weights
    that FSDP2 has cut (`DTensor`) count as the whole weights they are; every process must call `step` then.

    Which form for which optimizer: the loss forms suit SGD. Under Adam the gradient of a range loss, which sits on few
    elements, is divided by its own size and either swamps or starves; use a projection there.

    Args:
        model: the model whose weights are restricted; they are read anew at every step. Frozen ones are left out.
        kind: one of `PROJECTIONS`.
        grain: the groups whose range is restricted; match it to the quantizer's.
        clip: for `"clip"`: largest |W| in units of the group's rms; infinity changes nothing.
        include: see [`select_weights`].
        exclude: see [`select_weights`].
        min_numel: see [`select_weights`].
        factors: factor on the strength of `step` by pattern over parameter names; the last that matches counts, 0
            leaves the weight out.

    Raises:
        ValueError: for an unknown kind or grain, a clip that is not above 1, weights that are computed from others
            (parametrized or adapted ones cannot be set), and if nothing trainable is selected.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "clip",
        grain: Grain = "tensor",
        *,
        clip: float = 1.5,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        min_numel: int = 0,
        factors: Mapping[str, float] | None = None,
    ) -> None:
        if kind not in PROJECTIONS:
            raise ValueError(f"unknown projection {kind!r}: use one of {', '.join(PROJECTIONS)}")
        if not clip > 1:
            raise ValueError(f"clip={clip} is not above 1: no weight but ±c has all of it within its rms")
        self.kind = kind
        self.grain = parse_grain(grain)
        self.clip = clip
        self.selection, self.factors = select_trainable(model, include, exclude, min_numel, factors)
        for name, (module, attribute) in self.selection.items():
            if not isinstance(getattr(module, attribute), nn.Parameter):
                raise ValueError(f"{name} is computed from other parameters and cannot be projected: use a range loss")
        self.compiled = False
        self._stacker = Stacker(self.grain)
        self._levels: list[Tensor | None] = [None] * len(self.selection)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Fuse the pass of `"prox"` over many elements on a CPU with `torch.compile`; nothing else needs it."""
        self.compiled = True

    @torch.no_grad()
    def step(self, strength: Tensor | float = 1.0) -> None:
        """Restrict every selected weight once, in place.

        Args:
            strength: for `"prox"`: t, in units of the weight, usually learning rate × strength. For `"clip"`: the share
                of the way to the clipped weight, 1 for all of it, less while warming up; 0 changes nothing. A number,
                or one per selected weight, `(weights,)`.

        Raises:
            ValueError: naming weights that hold NaN or infinite values, unless they lie on an accelerator, where the
                host would have to wait to learn it. No weight is changed then.
        """
        if not isinstance(strength, Tensor) and (strength == 0 or (self.kind == "clip" and self.clip == float("inf"))):
            return
        weights = current_weights(self.selection)
        stacks = self._stacker.stack(weights, scaled(strength, self.factors))
        self._step_by_calls([stack for stack in stacks if stack.weight.tiles is None], weights)
        for stack in stacks:
            if stack.weight.tiles is not None:
                self._step_by_kernels(stack)

    def _step_by_kernels(self, stack: Stack) -> None:
        weight = stack.weight
        if weight.repeated is None:
            work = partial(_prox_tiles, weight) if self.kind == "prox" else partial(_clip_tiles, weight, self.clip)
            weight.repeated = Recorded(work, weight.held_groups, weight.tensor.device)
        weight.repeated(stack.per_group(stack.strength))

    def _step_by_calls(self, stacks: Sequence[Stack], weights: Sequence[Tensor]) -> None:
        if self.kind == "prox":
            routines = [
                _prox_limits(stack.weight, stack.per_group(stack.strength), self._before(stack), self.compiled)
                for stack in stacks
            ]
        else:
            routines = [_clip_limits(stack.weight, self.clip) for stack in stacks]
        found = run(routines)
        for stack, limits in zip(stacks, found, strict=True):
            for index, level in zip(stack.members, stack.cut(limits.level), strict=True):
                self._levels[index] = level
        if all(limits.level.is_cpu for limits in found):
            members = [index for stack in stacks for index in stack.members]
            names = list(self.selection)
            require_finite([names[index] for index in members], [self._levels[index] for index in members])
        for stack, limits in zip(stacks, found, strict=True):
            whole = self.kind == "prox" or (isinstance(stack.strength, float) and stack.strength == 1)
            share = None if whole else stack.per_group(stack.strength)
            change = partial(_clamp, weight=stack.weight, limits=limits, share=share)
            stack.update([weights[index] for index in stack.members], change)

    def _before(self, stack: Stack) -> Tensor | None:
        """Put the levels of the last step together; None in the first."""
        levels = [self._levels[index] for index in stack.members]
        return None if levels[0] is None else torch.cat(levels)


def _prox_tiles(weight: LocalWeight, amounts: Tensor) -> None:
    level, tops = weight.tiles.level_above(amounts)
    weight.tiles.clamp(level, tops=tops)


def _clip_tiles(weight: LocalWeight, multiple: float, shares: Tensor) -> None:
    (size,) = run([rms(weight)])
    weight.tiles.clamp(multiple * size, shares.float())


def clip_to_rms(weight: Tensor, multiple: float, grain: Grain = "tensor") -> Tensor:
    """Clamp every group to `±multiple · rms(group)`, the rms taken before.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        multiple: limit in units of the rms.
        grain: the groups whose rms counts.

    Returns:
        A new weight of the same shape and dtype.
    """
    return _clamped(weight, grain, lambda local: _clip_limits(local, multiple))


def prox_l_inf(weight: Tensor, t: float, grain: Grain = "tensor") -> Tensor:
    """Take the proximal step of `t · ‖W‖_inf`: `argmin_X ½ ‖X − W‖² + t ‖X‖_inf` for every group.

    By Moreau's identity it is `W − proj(W)` onto the L1 ball of radius t, which is W clamped to ±τ, where
    `Σ_i max(|W_i| − τ, 0) = t`: the largest magnitudes are shaved off to one level, t in total. A group whose
    magnitudes add up to no more than t becomes 0. Source: Parikh and Boyd, Proximal Algorithms, 2014, §6.5.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        t: what is shaved off each group, in units of the weight, ≥ 0.
        grain: the groups whose range is restricted.

    Returns:
        A new weight of the same shape and dtype.

    Raises:
        ValueError: for a negative t.
    """
    if t < 0:
        raise ValueError(f"t={t} is negative: a proximal step shrinks")
    return _clamped(weight, grain, lambda local: _prox_limits(local, t))


def _clip_limits(weight: LocalWeight, multiple: float) -> Routine[Limits]:
    size = yield from rms(weight)
    return Limits(multiple * size, Picked([], list(range(len(weight.blocks())))))


def _prox_limits(
    weight: LocalWeight, t: Tensor | float, before: Tensor | None = None, compiled: bool = False
) -> Routine[Limits]:
    """Solve `Σ_i max(|W_i| − τ, 0) = t` for τ.

    The sum is convex and falls with τ, and it is linear between magnitudes: Newton's method reaches the solution
    exactly, from below, in a few steps. Any part of the elements gives a start that is not above the solution; the
    cells' peaks give one that is close. Once many elements stand near the limit, that of the step before tells where to
    look.
    """
    t = weight.per_group(t).double()
    blocks = weight.blocks()
    warm = before is not None and before.is_cpu and not weight.spread
    many = crowded(blocks, before) if warm else [False] * len(blocks)
    cells = Cells(blocks, many)
    yield
    starts = []
    lasts, of_blocks = weight.split(before if warm else t), weight.split(t)
    for b, (block, peaks) in enumerate(zip(blocks, cells.split_peaks(), strict=True)):
        if many[b]:
            limit = _limit_of_many(block, lasts[b].item(), of_blocks[b].item(), compiled)
            starts.append(lasts[b].new_full((1,), limit))
        else:
            starts.append(_sorted_solution(_few_of(peaks), of_blocks[b]).to(block.dtype))
    limits = yield from weight.maximum(torch.cat(starts))
    picked = cells.pick(limits, above=True)
    magnitudes, groups = picked.above(blocks, limits)
    unsolved = [b for b in picked.whole if not many[b]]
    for _ in range(NEWTON_STEPS):
        found = _excess_of_few(magnitudes, groups, limits)
        parts, levels = weight.split(found), weight.split(limits)
        for b in unsolved:
            parts[b].copy_(excess(blocks[b], levels[b]))
        found = yield from weight.total(found)
        before, limits = limits, _newton_step(limits, found, t)
        # An accelerator takes all steps: to stop early, the host would have to wait for it
        if limits.is_cpu:
            stepped = weight.split(limits)
            unsolved = [b for b in unsolved if not torch.equal(stepped[b], levels[b])]
            if torch.equal(limits, before):
                break
    return Limits(limits, picked)


def _excess_of_few(magnitudes: np.ndarray, groups: np.ndarray, limit: Tensor) -> Tensor:
    """Sum what stands above the limits, and count the elements that do, `(groups, 2)`: 0 where there are none."""
    found = torch.zeros(len(limit), 2, dtype=torch.float64, device=limit.device)
    if magnitudes.size:
        above = np.maximum(magnitudes - limit.numpy()[groups], 0)
        for column, each in enumerate((above, above > 0)):
            found.numpy()[:, column] = np.bincount(groups, each, len(limit))
    return found


def _newton_step(limit: Tensor, found: Tensor, t: Tensor) -> Tensor:
    """Step from limits below the solution to the next, by the sums and counts above them, `(groups, 2)`."""
    sums, counts = found.unbind(dim=1)
    step = torch.where(sums == 0, limit, limit + (sums - t) / counts.clamp_min(1))
    return step.to(limit.dtype).maximum(limit)  # but for rounding, it is


@np.errstate(invalid="ignore")  # infinite elements make NaN of the limit, which is reported
def _limit_of_many(block: Tensor, limit: float, t: float, compiled: bool) -> float:
    """Solve for τ where many elements of the only group stand above it, to 1e-5 of what stands out.

    Newton's method from the limit of the step before. A step takes the count of elements above for constant, and so
    misses what it crosses, of which a sample tells: while training settles, one pass over the elements is enough.
    """
    sample = None
    for _ in range(NEWTON_STEPS):
        total, count = excess_of_one(block, limit, compiled)
        if count == 0:
            limit = 0.0
            continue
        if sample is None:  # after the first pass, which leaves the elements near
            sample = sample_magnitudes(block, max(SAMPLED_CELLS, block.numel() // (CELL * SAMPLED_SHARE)))
        start, limit = limit, max(limit + (total - t) / count, 0.0)  # in this order, NaN stays
        # With what ties at the start, which was not counted: elements that no optimizer step has moved
        crossed = sample[(sample > min(start, limit)) & (sample <= max(start, limit))]
        missed = block.numel() / sample.size * np.abs(crossed - limit).sum(dtype=np.float64).item()
        if abs(limit - start) * count <= 0.02 * total and missed <= 3e-4 * total:
            return limit + missed / count
    return limit


def _few_of(peaks: Tensor) -> Tensor:
    """Peaks of larger cells, where there are many, without those that are left over: quicker to sort."""
    groups, cells = peaks.shape
    return peaks if cells < 1024 else peaks[:, : cells - cells % 16].view(groups, -1, 16).amax(dim=2)


def _sorted_solution(magnitudes: Tensor, t: Tensor) -> Tensor:
    """Solve for τ on a few magnitudes, `(groups, n)`: with S_k the sum of the k largest, `τ = max_k (S_k − t) / k`."""
    if magnitudes.is_cpu:  # NumPy sorts thirty times as fast
        ordered = torch.from_numpy(np.sort(magnitudes.numpy(), axis=1)).double().flip(1)
    else:
        ordered = magnitudes.double().sort(dim=1, descending=True).values
    counts = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    return ((ordered.cumsum(dim=1) - t[:, None]) / counts).amax(dim=1).clamp_min(0)


def _clamped(weight: Tensor, grain: Grain, limits: Callable[[LocalWeight], Routine[Limits]]) -> Tensor:
    local, result = LocalWeight(weight, grain), weight.detach().clone()
    with torch.no_grad():
        (found,) = run([limits(local)])
        local.update(result, partial(_clamp, weight=local, limits=found))
    return result


def _clamp(blocks: Sequence[Tensor], weight: LocalWeight, limits: Limits, share: Tensor | float | None = None) -> None:
    """Go a share of the way to the limits, or all of it; the cells picked go all of it."""
    level, picked = limits
    for batch in picked.cells:
        bound = level.numpy()[batch.groups, None]
        batch.write(blocks, np.clip(batch.of(blocks), -bound, bound))
    levels = weight.split(level)
    shares = None if share is None else weight.split(weight.per_group(share).to(level.dtype))
    for b in picked.whole:
        _clamp_whole(blocks[b], levels[b], shares and shares[b])


def _clamp_whole(block: Tensor, level: Tensor, share: Tensor | None) -> None:
    if block.is_cpu and len(block) == 1 and share is None:
        block.clamp_(-level.item(), level.item())
        return
    for band, (piece,) in pieces(block):
        bound = level[band, None]
        # minimum and maximum broadcast fast, clamp with tensor bounds does not
        if share is None:
            torch.maximum(torch.minimum(piece, bound, out=piece), -bound, out=piece)
        else:
            piece.lerp_(torch.maximum(torch.minimum(piece, bound), -bound), share[band, None])
