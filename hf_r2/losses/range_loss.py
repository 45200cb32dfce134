"""A range loss over the selected weights of a model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from hf_r2.grain import Grain, blocks, group_counts, parse_grain
from hf_r2.losses.kurtosis import UNIFORM_KURTOSIS, kurtosis
from hf_r2.losses.l_inf import l_inf
from hf_r2.losses.margin import margin
from hf_r2.losses.soft_min_max import soft_min_max
from hf_r2.losses.tail_mean import tail_mean
from hf_r2.selection import output_first, select_weights

RANGE_LOSSES = ("l_inf", "margin", "soft_min_max", "tail", "kurtosis")


class RangeLoss(nn.Module):
    """`Σ_weights loss(weight)` over the selected weights, as a module for any training loop.

        range_loss = RangeLoss(model, kind="l_inf")
        loss = task_loss + 0.1 * range_loss()

    The margins of `"margin"` and the temperatures of `"soft_min_max"` are learnable, one per group. Train them with an
    optimizer of their own and without weight decay, which would pull them to zero:
    `torch.optim.SGD(range_loss.parameters(), lr=1e-2, weight_decay=0)`. The model's weights are not parameters of
    this module, and its `state_dict` holds the learnable values alone.

    Args:
        model: the model whose weights are restricted; they are read anew at every call.
        kind: one of `RANGE_LOSSES`.
        grain: the groups whose range is restricted; match it to the quantizer's.
        include: see [`select_weights`].
        exclude: see [`select_weights`].
        min_numel: see [`select_weights`].
        margin_reduction: `"max"` or `"sum"`, for `"margin"`; the margins start at each group's `max|W|`.
        temperature: first value for `"soft_min_max"`, relative to 1/rms of the weight.
        tail_fraction: share of the elements in the tail, for `"tail"`.
        kurtosis_target: kurtosis to hold, for `"kurtosis"`.

    Raises:
        ValueError: for an unknown kind, grain or pattern, and for an empty selection.
    """

    def __init__(
        self,
        model: nn.Module,
        kind: str = "l_inf",
        grain: Grain = "tensor",
        *,
        include: Sequence[str] | None = None,
        exclude: Sequence[str] | None = None,
        min_numel: int = 0,
        margin_reduction: str = "max",
        temperature: float = 5.0,
        tail_fraction: float = 0.01,
        kurtosis_target: float = UNIFORM_KURTOSIS,
    ) -> None:
        super().__init__()
        if kind not in RANGE_LOSSES:
            raise ValueError(f"unknown range loss {kind!r}: use one of {', '.join(RANGE_LOSSES)}")
        self.kind = kind
        self.grain = parse_grain(grain)
        # A plain dict of (module, "weight"): nothing in it becomes a submodule, so no model weight is saved twice
        self.selection = select_weights(model, include, exclude, min_numel)
        self.learnable = nn.ParameterDict(
            {_key(name): nn.Parameter(self._start(weight, temperature)) for name, weight in self.weights()}
            if kind in ("margin", "soft_min_max")
            else {}
        )
        self.margin_reduction = margin_reduction
        self.tail_fraction = tail_fraction
        self.kurtosis_target = kurtosis_target

    def weights(self) -> list[tuple[str, Tensor]]:
        """List the selected weights as (name, tensor with output channels first), as they are now."""
        return [
            (name, output_first(module, getattr(module, attribute)))
            for name, (module, attribute) in self.selection.items()
        ]

    def forward(self) -> Tensor:
        """Return the sum over the selected weights: a float32 scalar on the first weight's device."""
        terms = [self._loss(name, weight) for name, weight in self.weights()]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def _loss(self, name: str, weight: Tensor) -> Tensor:
        match self.kind:
            case "l_inf":
                return l_inf(weight, self.grain)
            case "margin":
                return margin(weight, self._learned(name, weight), self.grain, self.margin_reduction)
            case "soft_min_max":
                return soft_min_max(weight, self._learned(name, weight), self.grain)
            case "tail":
                return tail_mean(weight, self.tail_fraction, self.grain)
            case _:
                return kurtosis(weight, self.kurtosis_target, self.grain)

    def _learned(self, name: str, weight: Tensor) -> Tensor:
        return self.learnable[_key(name)].to(weight.device)

    def _start(self, weight: Tensor, temperature: float) -> Tensor:
        """First learnable values: the range as it is, or the given temperature."""
        if self.kind == "soft_min_max":
            groups = sum(group_counts(weight.shape, self.grain))
            return torch.full((groups,), float(temperature), device=weight.device)
        with torch.no_grad():
            return torch.cat([block.abs().amax(dim=1) for block in blocks(weight, self.grain)])


def _key(name: str) -> str:
    """Parameter names cannot hold dots inside a ParameterDict."""
    return name.replace(".", "/")
