"""A range loss over the selected weights of a model."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_r2.grain import Grain, group_counts, parse_grain
from hf_r2.losses.kurtosis import UNIFORM_KURTOSIS, kurtosis_measure
from hf_r2.losses.l_inf import measure_l_inf
from hf_r2.losses.margin import margin_measure
from hf_r2.losses.soft_min_max import first_temperature, soft_min_max_measure
from hf_r2.losses.tail_mean import tail_mean_measure
from hf_r2.losses.term import Measure, Measured, measure_all, range_term
from hf_r2.moments import extremes, require_finite
from hf_r2.selection import current_weights, held, output_first, scaled, select_trainable
from hf_r2.sharding import LocalWeight, Routine, cut_again, run
from hf_r2.stacking import Stack, Stacker

RANGE_LOSSES = ("l_inf", "margin", "soft_min_max", "tail", "kurtosis")


class RangeLoss(nn.Module):
    """`Σ_weights factor · loss(weight)` over the selected weights, for any training loop.

    Differentiable, as a term of the loss:

        range_loss = RangeLoss(model, kind="l_inf")
        (task_loss + 0.1 * range_loss()).backward()

    or in place, which builds no gradient of its own and costs a read of the weights for the losses whose gradient sits
    on few elements; this is what the Trainer does:

        range_loss.measure(0.1)
        task_loss.backward()
        range_loss.accumulate_grad_()

    Weights that FSDP2 has cut (`DTensor`) count as the whole weights they are; every process must call it then.

    The margins of `"margin"` and the temperatures of `"soft_min_max"` are learnable, one per group. Train them with an
    optimizer of their own and without weight decay, which would pull them to zero:
    `torch.optim.SGD(range_loss.parameters(), lr=1e-2, weight_decay=0)`. The model's weights are not parameters of
    this module, and its `state_dict` holds the learnable values alone.

    Args:
        model: the model whose weights are restricted; they are read anew at every call. Frozen ones are left out.
        kind: one of `RANGE_LOSSES`.
        grain: the groups whose range is restricted; match it to the quantizer's.
        include: see [`select_weights`].
        exclude: see [`select_weights`].
        min_numel: see [`select_weights`].
        factors: factor on a weight's loss by pattern over parameter names; the last that matches counts; 0 leaves the
            weight out.
        margin_reduction: `"max"` or `"sum"`, for `"margin"`; the margins start at each group's `max|W|`.
        temperature: first value for `"soft_min_max"`, relative to 1/rms of the weight; without it, the one at which
            each group's loss sees 90 % of its range.
        tail_fraction: share of the elements in the tail, for `"tail"`.
        kurtosis_target: kurtosis to hold, for `"kurtosis"`.

    Raises:
        ValueError: for an unknown kind, grain or pattern, and if nothing trainable is selected.
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
        factors: Mapping[str, float] | None = None,
        margin_reduction: str = "max",
        temperature: float | None = None,
        tail_fraction: float = 0.01,
        kurtosis_target: float = UNIFORM_KURTOSIS,
    ) -> None:
        super().__init__()
        if kind not in RANGE_LOSSES:
            raise ValueError(f"unknown range loss {kind!r}: use one of {', '.join(RANGE_LOSSES)}")
        self.kind = kind
        self.grain = parse_grain(grain)
        # In a list, and in a plain dict of (module, "weight"): no submodules, so no model weight is saved twice
        self._model = [model]
        self.selection, self.factors = select_trainable(model, include, exclude, min_numel, factors)
        self.margin_reduction = margin_reduction
        self.tail_fraction = tail_fraction
        self.kurtosis_target = kurtosis_target
        self.compiled = False
        self.learnable = nn.ParameterDict(self._first_values(temperature))
        self._keys = [_key(name) for name in self.selection] if len(self.learnable) else []
        self._stacker = Stacker(self.grain)
        self._measured: list[tuple[Stack, Measured]] = []

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Fuse the passes of `"soft_min_max"` with `torch.compile`; the other losses have nothing to fuse."""
        self.compiled = True

    def forward(self) -> Tensor:
        """Return the sum over the selected weights: a float32 scalar on the first weight's device, differentiable."""
        return range_term(self._routine(), self._stacker, self._weights(), self._learned(), self.factors).float()

    @torch.no_grad()
    def measure(self, strength: Tensor | float = 1.0) -> Tensor:
        """Return strength × what [`forward`] does, without a graph, and remember it for [`accumulate_grad_`].

        Args:
            strength: λ, or one per selected weight, `(weights,)`.

        Raises:
            ValueError: naming weights that hold NaN or infinite values, unless they lie on an accelerator, where the
                host would have to wait to learn it.
        """
        stacks = self._stacker.stack(self._weights(), scaled(strength, self.factors))
        measured, value = measure_all(self._routine(), stacks, self._learned())
        self._measured = list(zip(stacks, measured, strict=True))
        value = value.float()
        if value.is_cpu and not value.isfinite():
            found = {}
            for stack, measured in self._measured:
                found |= zip(stack.members, measured.value.expand(len(stack.members)), strict=True)
            require_finite(self.selection, [found[index] for index in range(len(self.selection))])
        return value

    @torch.no_grad()
    def accumulate_grad_(self, grad_scale: Tensor | float = 1.0) -> None:
        """Add the gradient of the value last measured to `.grad` of the weights and of the learnable values.

        Call it after backward, once the gradients are those of all micro-batches and processes, and before they are
        clipped. The weights must be as they were when measured.

        Args:
            grad_scale: what the gradients of the weights are multiplied by, under a gradient scaler.
        """
        owners, learned = list(self.selection.values()), self._learned()
        for stack, measured in self._measured:
            add = partial(measured.add_gradient, scale=stack.per_group(stack.strength * grad_scale))
            _add_gradients([owners[index] for index in stack.members], stack, add)
            if measured.learned is not None:
                found = stack.cut(measured.learned * stack.per_group(stack.strength))
                _add_all([learned[index] for index in stack.members], found)
        self._measured = []

    @torch.no_grad()
    def gradient_ratios(self) -> Tensor:
        """Norm of what is in `.grad` over that of the loss last measured, at strength 1: `(weights,)`.

        Raises:
            ValueError: for weights that are computed from others: they have no gradient of their own.
        """
        ratios = {}
        for name, weight, own in self._own_gradients():
            if not isinstance(weight, nn.Parameter):
                raise ValueError(f"{name} is computed from other parameters: give a strength or a target crest factor")
            ratios[name] = _norm(weight.grad) / _norm(own).clamp_min(torch.finfo(own.dtype).tiny)
        return self._in_order(ratios)

    @torch.no_grad()
    def gradient_peaks(self) -> Tensor:
        """Largest entry of the gradient of the loss last measured, at strength 1, over `max|W|`: `(weights,)`."""
        peaks = {}
        for name, weight, own in self._own_gradients():
            gradient, top = run([_range(LocalWeight(tensor, "tensor")) for tensor in (own, weight)])
            peaks[name] = (gradient / top)[0]
        return self._in_order(peaks)

    def _in_order(self, values: Mapping[str, Tensor]) -> Tensor:
        """Stack one value per weight, which stacks come to in another order, in that of the selection."""
        ordered = [values[name] for name in self.selection]
        return torch.stack([value.to(ordered[0].device) for value in ordered])

    def _own_gradients(self) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Yield name, weight and gradient of the loss last measured, at strength 1, one weight at a time."""
        names = list(self.selection)
        for stack, measured in self._measured:
            weights = [getattr(*self.selection[names[index]]) for index in stack.members]
            own = [torch.zeros_like(weight) for weight in weights]
            modules = [self.selection[names[index]][0] for index in stack.members]
            targets = [output_first(*pair) for pair in zip(modules, own, strict=True)]
            stack.update(targets, partial(measured.add_gradient, scale=1.0))
            yield from zip((names[index] for index in stack.members), weights, own, strict=True)

    def _weights(self) -> list[Tensor]:
        cut_again(*self._model)
        return current_weights(self.selection)

    def _routine(self) -> Measure:
        match self.kind:
            case "l_inf":
                return measure_l_inf
            case "margin":
                return margin_measure(self.margin_reduction)
            case "soft_min_max":
                return soft_min_max_measure(self.compiled)
            case "tail":
                return tail_mean_measure(self.tail_fraction)
            case _:
                return kurtosis_measure(self.kurtosis_target)

    def _learned(self) -> list[Tensor]:
        parameters = self.learnable._parameters  # looked up once: by their names it takes as long as some kernels
        return [parameters[key] for key in self._keys]

    def _first_values(self, temperature: float | None) -> dict[str, nn.Parameter]:
        """First learnable values: the range as it is, or the temperature."""
        if self.kind not in ("margin", "soft_min_max"):
            return {}
        weights = [LocalWeight(weight, self.grain) for weight in current_weights(self.selection)]
        if self.kind == "margin":
            values = run([_range(weight) for weight in weights])
        elif temperature is None:
            values = run([first_temperature(weight) for weight in weights])
        else:
            counts = [sum(group_counts(weight.shape, self.grain)) for weight in weights]
            values = [torch.full((count,), temperature, dtype=torch.float32) for count in counts]
        return {
            _key(name): nn.Parameter(value.float().to(weight.tensor.device))
            for name, value, weight in zip(self.selection, values, weights, strict=True)
        }


def _range(weight: LocalWeight) -> Routine[Tensor]:
    bounds = yield from extremes(weight)
    return (yield from weight.whole(bounds.abs().amax(dim=1)))


def _add_gradients(owners: list[tuple[nn.Module, str]], stack: Stack, add: Callable[[list[Tensor]], None]) -> None:
    """Add to the gradients of the weights of a stack."""
    weights = [held(module, attribute) for module, attribute in owners]
    targets = [_gradient_of(weight) for weight in weights]
    stack.update([output_first(module, target) for (module, _), target in zip(owners, targets, strict=True)], add)
    computed = [index for index, weight in enumerate(weights) if not isinstance(weight, nn.Parameter)]
    for (module, attribute), target in ((owners[index], targets[index]) for index in computed):
        # A weight computed from parameters (parametrized, or with adapters): its gradient goes on to them
        with torch.enable_grad():
            weight = getattr(module, attribute)
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        parts = torch.autograd.grad(weight, parameters, target, allow_unused=True)
        reached = [index for index, part in enumerate(parts) if part is not None]
        # Copies, as parts of several parameters may be one tensor
        _add_all([parameters[index] for index in reached], [parts[index].clone() for index in reached])


def _gradient_of(weight: Tensor) -> Tensor:
    # Once its adapters are merged or disabled, the weight of their layer is its frozen base
    if not isinstance(weight, nn.Parameter) or not weight.requires_grad:
        return torch.zeros_like(weight)
    if weight.grad is None:
        weight.grad = torch.zeros_like(weight)
    return weight.grad


def _norm(gradient: Tensor | None) -> Tensor:
    if gradient is None:
        return torch.zeros((), dtype=torch.float32)
    norm = torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def _add_all(parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
    """Add to the gradients of parameters; what is added becomes the gradient of one that has none."""
    if parameters and all(parameter.grad is not None for parameter in parameters):
        torch._foreach_add_([parameter.grad for parameter in parameters], list(gradients))
        return
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def _key(name: str) -> str:
    """Parameter names cannot hold dots inside a ParameterDict."""
    return name.replace(".", "/")
