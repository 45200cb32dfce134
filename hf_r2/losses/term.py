"""A range loss measured on weights, and its gradient written where it is wanted.

Plain autograd would build several tensors of the weight's size for gradients that sit on few elements. So every loss is
a routine (see `hf_r2.sharding`) that measures one weight and returns a [`Measured`]: the value, and a function that
adds the weight's gradient to blocks given to it, such as those of `parameter.grad`.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from hf_r2.selection import scaled
from hf_r2.sharding import LocalWeight, Routine, run
from hf_r2.stacking import BesideEachOther, Stack, Stacker
from hf_r2.tiles import Recorded

AddGradient = Callable[[Sequence[Tensor], Tensor | float], None]
"""`add_gradient(blocks, scale)` with a number, a scalar or one scale per group."""


class Measured(NamedTuple):
    """What a range loss found out about one weight.

    Args:
        value: the loss of the whole weight, a scalar; of weights beside each other, `(weights,)`.
        add_gradient: `add_gradient(blocks, scale)` adds scale × gradient to the weight's blocks held here, in place.
        learned: gradient of the learnable values, one per group of the whole weight.
    """

    value: Tensor
    add_gradient: AddGradient
    learned: Tensor | None = None


Measure = Callable[..., Routine[Measured]]
"""`measure(weight)` or `measure(weight, learned)`, with one learned value per group of the whole weight."""


def range_term(
    measure: Measure,
    stacker: Stacker,
    weights: Sequence[Tensor],
    learned: Sequence[Tensor] = (),
    factors: Tensor | None = None,
) -> Tensor:
    """Add up a range loss over weights, differentiably (once).

    Args:
        measure: the loss's routine.
        stacker: puts the weights together, with the groups whose range is restricted.
        weights: tensors or DTensors `(out, in, …)`, any float dtype.
        learned: for each weight, its learnable values `(groups,)`; or nothing.
        factors: for each weight, a factor on its loss, `(weights,)`; 1 without.

    Returns:
        Scalar in float32 or better, on the first weight's device.
    """
    return _RangeTerm.apply(measure, stacker, factors, len(weights), *weights, *learned)


def measure_all(
    measure: Measure, stacks: Sequence[Stack], learned: Sequence[Tensor] = (), repeatedly: bool = True
) -> tuple[list[Measured], Tensor]:
    """Measure many weights, with one collective per step for all of them if they are cut over processes.

    Args:
        measure: the loss's routine.
        stacks: the weights.
        learned: for each weight, not each stack, its learnable values; or nothing.
        repeatedly: whether what is found out about a stack is needed only until it is measured again.

    Returns:
        What was found out about each stack, and the sum of strength × value, on the device of the first.
    """
    own = [[learned[index] for index in stack.members] if learned else [] for stack in stacks]
    with torch.no_grad():
        found = run(
            [
                _measure_repeatedly(measure, stack, values)
                if repeatedly and stack.weight.tiles is not None
                else _measure_stack(measure, stack, values)
                for stack, values in zip(stacks, own, strict=True)
            ]
        )
        sums = [total for _, total in found]
        total = sums[0] if len(sums) == 1 else torch.stack([each.to(sums[0].device) for each in sums]).sum()
    return [measured for measured, _ in found], total


def _measure_stack(measure: Measure, stack: Stack, learned: list[Tensor]) -> Routine[tuple[Measured, Tensor]]:
    """Measure weights, and add up strength × value."""
    measured = yield from _measure_once(measure, stack.weight, learned)
    return measured, (measured.value * stack.strength).sum()


def _measure_once(measure: Measure, weight: LocalWeight, learned: list[Tensor]) -> Routine[Measured]:
    return (yield from measure(weight, torch.cat(learned)) if learned else measure(weight))


def _measure_repeatedly(measure: Measure, stack: Stack, learned: list[Tensor]) -> Routine[tuple[Measured, Tensor]]:
    """Do what [`_measure_stack`] does, on a device."""
    yield from ()
    places = [values.data_ptr() for values in learned]
    if stack.weight.repeated is None or stack.weight.repeated.places != places:
        stack.weight.repeated = _Repeated(measure, stack.weight, learned, places)
    return stack.weight.repeated.measure(stack.strength)


class _Repeated:
    """A range loss of weights on a device, measured and written again and again.

    Args:
        measure: the loss's routine.
        weight: the weights as one.
        learned: for each of them, its learnable values; or nothing.
        places: where these lie.
    """

    def __init__(self, measure: Measure, weight: BesideEachOther, learned: list[Tensor], places: list[int]) -> None:
        self.places = places
        self._measure, self._weight, self._learned = measure, weight, learned
        self._targets: Sequence[Tensor] = []
        self._read = Recorded(self._measure_now, len(weight.parts), weight.tensor.device)
        self._write = Recorded(self._add_recorded, weight.held_groups, weight.tensor.device)

    def measure(self, strength: Tensor | float) -> tuple[Measured, Tensor]:
        """Measure; see [`measure_all`]."""
        found = self._read(strength)
        measured, total = found
        return measured._replace(add_gradient=partial(self._add_gradient, found)), total.clone()

    def _measure_now(self, strengths: Tensor) -> tuple[Measured, Tensor]:
        (measured,) = run([_measure_once(self._measure, self._weight, self._learned)])
        return measured, (measured.value * strengths).sum()

    def _add_gradient(self, found: tuple[Measured, Tensor], targets: Sequence[Tensor], scale: Tensor | float) -> None:
        if found is not self._read.result:  # which is not recorded yet
            found[0].add_gradient(targets, scale)
            return
        self._weight.tiles.aim(targets)
        self._targets = targets
        self._write(scale)
        self._targets = []

    def _add_recorded(self, scale: Tensor) -> None:
        self._read.result[0].add_gradient(self._targets, scale)


class _RangeTerm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, measure: Measure, stacker: Stacker, factors: Tensor | None, count: int, *tensors: Tensor
    ) -> Tensor:
        weights, learned = tensors[:count], tensors[count:]
        ctx.stacks = stacker.stack(weights, scaled(1.0, factors))
        ctx.measured, total = measure_all(measure, ctx.stacks, learned, repeatedly=False)
        # Saved, so that autograd notices if a weight is changed in place before backward
        ctx.save_for_backward(*weights)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, scale: Tensor) -> tuple:
        weights = ctx.saved_tensors
        gradients: list[Tensor | None] = [None] * len(weights)
        learned: list[Tensor | None] = [None] * (len(ctx.needs_input_grad) - 4 - len(weights))
        for stack, measured in zip(ctx.stacks, ctx.measured, strict=True):
            strength = (stack.strength * scale).to(weights[stack.members[0]].device)
            if any(ctx.needs_input_grad[4 + index] for index in stack.members):
                targets = [torch.zeros_like(weights[index]) for index in stack.members]
                stack.update(targets, partial(measured.add_gradient, scale=stack.per_group(strength)))
                for index, target in zip(stack.members, targets, strict=True):
                    gradients[index] = target
            if learned:
                found = measured.learned * stack.per_group(strength)
                for index, values in zip(stack.members, stack.cut(found), strict=True):
                    learned[index] = values
        return None, None, None, None, *gradients, *learned
