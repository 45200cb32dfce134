"""Range restriction decoupled from the loss, as AdamW decouples weight decay."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from hf_r2.cells import CELL, PickedCells, cell_peaks, crowded, excess, pick_cells, sample_cells
from hf_r2.grain import Grain, parse_grain, pieces
from hf_r2.moments import require_finite, rms
from hf_r2.selection import current_weights, scaled, select_trainable
from hf_r2.sharding import LocalWeight, Routine, run
from hf_r2.stacking import stack_alike

PROJECTIONS = ("prox", "clip")

NEWTON_STEPS = 24
"""At most; weights take two to five."""

SAMPLED_CELLS = 256
"""At least, of a weight that is sampled."""


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
        self._limits: list[list[Tensor]] = []
        self.selection, self.factors = select_trainable(model, include, exclude, min_numel, factors)
        for name, (module, attribute) in self.selection.items():
            if not isinstance(getattr(module, attribute), nn.Parameter):
                raise ValueError(f"{name} is computed from other parameters and cannot be projected: use a range loss")

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
        strengths = scaled(strength, self.factors, len(self.selection))
        weights = [weight.detach() for weight in current_weights(self.selection)]
        stacks = stack_alike(weights, self.grain, strengths)
        if self.kind == "prox":
            before = self._limits or [None] * len(stacks)
            routines = [_prox_limits(s.weight, s.strength, limits) for s, limits in zip(stacks, before, strict=True)]
        else:
            routines = [_clip_limits(stack.weight, self.clip) for stack in stacks]
        self._limits = run(routines)
        if all(limit.is_cpu for limits in self._limits for limit in limits):
            names = list(self.selection)
            require_finite([names[stack.members[0]] for stack in stacks], map(torch.cat, self._limits))
        for stack, limits in zip(stacks, self._limits, strict=True):
            share = 1.0 if self.kind == "prox" else stack.strength
            stack.update([weights[index] for index in stack.members], partial(_clamp, limits=limits, share=share))


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


def _clip_limits(weight: LocalWeight, multiple: float) -> Routine[list[Tensor]]:
    sizes = yield from rms(weight)
    return [multiple * size for size in sizes]


def _prox_limits(weight: LocalWeight, t: Tensor | float, before: list[Tensor] | None = None) -> Routine[list[Tensor]]:
    """Solve `Σ_i max(|W_i| − τ, 0) = t` for τ, `(groups,)` per block.

    The sum is convex and falls with τ, and it is linear between magnitudes: Newton's method reaches the solution
    exactly, from below, in a few steps. Any part of the elements gives a start that is not above the solution; the
    cells' peaks give one that is close, and if few cells hold what is above it, sorting those elements solves for a
    single group. Once many elements stand near the limit, that of the step before is closer still.
    """
    t = torch.as_tensor(t, dtype=torch.float64, device=weight.tensor.device)
    warm = (
        before is not None
        and not weight.spread
        and all(crowded(*pair) for pair in zip(weight.blocks(), before, strict=True))
    )
    picked: list[PickedCells | None] = [None] * len(weight.elements)
    if warm:
        limits = [_sampled_solution(*pair, t) for pair in zip(weight.blocks(), before, strict=True)]
    else:
        peaks = [cell_peaks(block) for block in weight.blocks()]
        yield
        limits = yield from weight.maximum([_sorted_solution(_few_of(peak), t).to(peak.dtype) for peak in peaks])
        picked = [pick_cells(*each, above=True) for each in zip(weight.blocks(), peaks, limits, strict=True)]
        if picked[0] and len(limits[0]) == 1 and not weight.spread:
            return [_solution_in(picked[0].of(weight.blocks()[0]), limits[0], t)]
    for _ in range(NEWTON_STEPS):
        found = [excess(*arguments).T for arguments in zip(weight.blocks(), limits, picked, strict=True)]
        found = yield from weight.total(found)
        new = [_newton_step(limit, part, t, warm) for limit, part in zip(limits, found, strict=True)]
        # An accelerator takes all steps: to stop early, the host would have to wait for it
        done = weight.tensor.is_cpu and all(_settled(*each, warm) for each in zip(new, limits, found, strict=True))
        limits = new
        if done:
            break
    return limits


def _newton_step(limit: Tensor, found: Tensor, t: Tensor, warm: bool) -> Tensor:
    """Step from limits to the next, by the sums and counts above them, `(groups, 2)`."""
    sums, counts = found.unbind(dim=1)
    # No element above the limit: from zero, the way is up
    step = torch.where(sums == 0, 0 if warm else limit, limit + (sums - t) / counts.clamp_min(1))
    return step.clamp_min(0).to(limit.dtype)


def _settled(new: Tensor, old: Tensor, found: Tensor, warm: bool) -> bool:
    """Tell whether another step would change nothing, or among many elements a millionth of what stands out.

    Newton's error is squared with every step: a step of a thousandth of the mean excess leaves about a millionth.
    """
    if not warm:
        return torch.equal(new, old)
    sums, counts = found.unbind(dim=1)
    return bool(((new - old).abs() * counts.clamp_min(1) <= 1e-3 * sums).all())


def _sampled_solution(block: Tensor, limit: Tensor, t: Tensor) -> Tensor:
    """Solve for τ on a part of a block of one group, from any limit: on so many elements that it comes close."""
    cells = block.numel() // CELL
    if cells < 16 * SAMPLED_CELLS:
        return limit
    sample = sample_cells(block, max(SAMPLED_CELLS, cells // 16))
    share = t * (sample.numel() / block.numel())
    for _ in range(NEWTON_STEPS):
        found = excess(sample, limit, None).T
        limit, last = _newton_step(limit, found, share, warm=True), limit
        if _settled(limit, last, found, warm=True):
            break
    return limit


def _few_of(peaks: Tensor) -> Tensor:
    """Peaks of larger cells, where there are many, without those that are left over: quicker to sort."""
    groups, cells = peaks.shape
    return peaks if cells < 1024 else peaks[:, : cells - cells % 16].view(groups, -1, 16).amax(dim=2)


def _solution_in(cells: np.ndarray, limit: Tensor, t: Tensor) -> Tensor:
    """Solve for τ of the only group on the cells that hold all elements above a limit that is not above τ."""
    magnitudes = np.abs(cells)
    above = magnitudes[~(magnitudes <= limit.item())]  # NaN, too
    return _sorted_solution(torch.from_numpy(above)[None], t).to(limit.dtype) if above.size else limit


def _sorted_solution(magnitudes: Tensor, t: Tensor) -> Tensor:
    """Solve for τ on a few magnitudes, `(groups, n)`: with S_k the sum of the k largest, `τ = max_k (S_k − t) / k`."""
    if magnitudes.is_cpu:  # NumPy sorts thirty times as fast
        ordered = torch.from_numpy(np.sort(magnitudes.numpy(), axis=1)).double().flip(1)
    else:
        ordered = magnitudes.double().sort(dim=1, descending=True).values
    counts = torch.arange(1, ordered.shape[1] + 1, device=ordered.device)
    return ((ordered.cumsum(dim=1) - t) / counts).amax(dim=1).clamp_min(0)


def _clamped(weight: Tensor, grain: Grain, limits: Callable[[LocalWeight], Routine[list[Tensor]]]) -> Tensor:
    local, result = LocalWeight(weight, grain), weight.detach().clone()
    with torch.no_grad():
        (found,) = run([limits(local)])
        local.update(result, partial(_clamp, limits=found))
    return result


def _clamp(blocks: list[Tensor], limits: list[Tensor], share: Tensor | float = 1.0) -> None:
    for block, limit in zip(blocks, limits, strict=True):
        if block.is_cpu and len(block) == 1 and isinstance(share, float) and share == 1:
            block.clamp_(-limit.item(), limit.item())
            continue
        for band, (piece,) in pieces(block):
            bound = limit[band, None]
            # minimum and maximum broadcast fast, clamp with tensor bounds does not
            if isinstance(share, float) and share == 1:
                torch.maximum(torch.minimum(piece, bound, out=piece), -bound, out=piece)
            else:
                piece.lerp_(torch.maximum(torch.minimum(piece, bound), -bound), share)
