"""Weights of one shape on an accelerator, worked on as one, so that many weights need as many kernels as one."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_r2.grain import DEVICE_PIECE, Grain, group_sizes
from hf_r2.sharding import LocalWeight


class Stack(NamedTuple):
    """Weights that are measured and written together; mostly one.

    Args:
        members: their positions among all weights.
        weight: the weight; of several, a copy with their groups one after the other.
        strength: of each of them: a number, or of a single one a scalar tensor.
    """

    members: list[int]
    weight: LocalWeight
    strength: Tensor | float

    def update(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of tensors of the weights' layouts, one per member, in place."""
        if len(targets) == 1:
            self.weight.update(targets[0], change)
            return
        together = torch.cat([target.reshape(-1, *self.weight.shape[1:]) for target in targets])
        self.weight.update(together, change)
        parts = together.chunk(len(targets))
        torch._foreach_copy_(list(targets), [p.reshape(t.shape) for p, t in zip(parts, targets, strict=True)])

    def cut(self, values: Tensor) -> list[Tensor]:
        """Cut one value per group to those of each member."""
        return list(values.chunk(len(self.members)))


def stack_alike(weights: Sequence[Tensor], grain: Grain, strengths: Sequence[Tensor | float]) -> list[Stack]:
    """Put weights of one shape, dtype, device and strength together.

    On a CPU, where a kernel costs nothing to start, and for weights that are cut over processes, each stays alone.

    Args:
        weights: output channels first.
        grain: see [`hf_r2.grain.parse_grain`].
        strengths: one per weight.
    """
    alike: dict[object, list[int]] = {}
    for index, (weight, strength) in enumerate(zip(weights, strengths, strict=True)):
        key = (weight.shape, weight.dtype, weight.device, strength) if _stackable(weight, grain, strength) else index
        alike.setdefault(key, []).append(index)
    stacks = []
    for members in alike.values():
        most = max(1, DEVICE_PIECE // max(1, weights[members[0]].numel()))
        for start in range(0, len(members), most):
            some = members[start : start + most]
            stacks.append(Stack(some, _together([weights[index] for index in some], grain), strengths[some[0]]))
    return stacks


def _stackable(weight: Tensor, grain: Grain, strength: Tensor | float) -> bool:
    plain = not weight.is_cpu and not isinstance(weight, DTensor) and isinstance(strength, float)
    # A second block, the short last groups of all channels, would come between the members
    return plain and len(group_sizes(weight.shape, grain)) == 1


def _together(weights: list[Tensor], grain: Grain) -> LocalWeight:
    if len(weights) == 1:
        return LocalWeight(weights[0], grain)
    if grain == "tensor":
        # Each becomes one output channel: its only group
        return LocalWeight(torch.stack([weight.detach().flatten() for weight in weights]), "channel")
    return LocalWeight(torch.cat([weight.detach() for weight in weights]), grain)
