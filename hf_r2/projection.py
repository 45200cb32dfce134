"""Range restriction decoupled from the loss, as AdamW decouples weight decay."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_r2.grain import Grain, blocks, join, parse_grain
from hf_r2.selection import output_first, select_weights

PROJECTIONS = ("prox", "clip")


class RangeProjection:
    """Pulls the selected weights back inside a range after every optimizer step.

        projection = RangeProjection(model, kind="clip", clip=1.5)
        …
        optimizer.step()
        projection.step()

    `"clip"` limits |W| to a multiple of the weight's rms; `"prox"` takes the proximal step of `t · ‖W‖_inf`, whose pull
    does not depend on the optimizer. Only the selected weights change: no bias, norm or optimizer state does.

    Which form for which optimizer: the loss forms suit SGD. Under Adam the gradient of a range loss, which sits on few
    elements, is divided by its own size and either swamps or starves; use a projection there.

    Args:
        model: the model whose weights are restricted; they are read anew at every step.
        kind: one of `PROJECTIONS`.
        grain: the groups whose range is restricted; match it to the quantizer's.
        clip: for `"clip"`: largest |W| in units of the group's rms; infinity changes nothing.
        include: see [`select_weights`].
        exclude: see [`select_weights`].
        min_numel: see [`select_weights`].

    Raises:
        ValueError: for an unknown kind or grain, a clip that is not above 1, and an empty selection.
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
    ) -> None:
        if kind not in PROJECTIONS:
            raise ValueError(f"unknown projection {kind!r}: use one of {', '.join(PROJECTIONS)}")
        if not clip > 1:
            raise ValueError(f"clip={clip} is not above 1: no weight but ±c has all of it within its rms")
        self.kind = kind
        self.grain = parse_grain(grain)
        self.clip = clip
        self.selection = select_weights(model, include, exclude, min_numel)

    @torch.no_grad()
    def step(self, strength: float = 1.0) -> None:
        """Restrict every selected weight once, in place.

        Args:
            strength: for `"prox"`: t, in units of the weight, usually learning rate × strength. For `"clip"`: the share
                of the way to the clipped weight, 1 for all of it, less while warming up; 0 changes nothing.
        """
        if strength == 0 or (self.kind == "clip" and self.clip == float("inf")):
            return
        for module, attribute in self.selection.values():
            weight = output_first(module, getattr(module, attribute))
            if self.kind == "prox":
                weight.copy_(prox_l_inf(weight, strength, self.grain))
            else:
                weight.lerp_(clip_to_rms(weight, self.clip, self.grain), strength)


def clip_to_rms(weight: Tensor, multiple: float, grain: Grain = "tensor") -> Tensor:
    """Clamp every group to `±multiple · rms(group)`, the rms taken before.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        multiple: limit in units of the rms.
        grain: the groups whose rms counts.

    Returns:
        A new weight of the same shape and dtype.
    """
    parts = []
    for block in blocks(weight, grain):
        limit = (multiple * block.square().mean(dim=1, keepdim=True).sqrt()).expand_as(block)
        parts.append(block.clamp(-limit, limit))
    return join(parts, weight.shape, grain).to(weight.dtype)


def prox_l_inf(weight: Tensor, t: float, grain: Grain = "tensor") -> Tensor:
    """Take the proximal step of `t · ‖W‖_inf`: `argmin_X ½ ‖X − W‖² + t ‖X‖_inf` for every group.

    By Moreau's identity it is `W − proj(W)` onto the L1 ball of radius t, which is W clamped to ±τ, where
    `Σ_i max(|W_i| − τ, 0) = t`: the largest magnitudes are shaved off to one level, t in total. With |W| sorted
    downwards and S_k the sum of the first k, `τ = max_k (S_k − t) / k`, exactly; a group whose magnitudes add up to no
    more than t becomes 0. Source: Parikh and Boyd, Proximal Algorithms, 2014, §6.5.

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
    parts = []
    for block in blocks(weight, grain):
        magnitudes = block.abs().sort(dim=1, descending=True).values
        counts = torch.arange(1, block.shape[1] + 1, device=block.device)
        # float64: S_k adds up many magnitudes, and t may be far below the rounding of a float32 sum
        levels = (magnitudes.double().cumsum(dim=1) - t) / counts
        limit = levels.amax(dim=1, keepdim=True).clamp_min(0).to(block.dtype).expand_as(block)
        parts.append(block.clamp(-limit, limit))
    return join(parts, weight.shape, grain).to(weight.dtype)
