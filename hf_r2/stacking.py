"""Weights that are worked on as one.

On an accelerator they have one shape, and need as many kernels as one weight does. On a CPU they may have any, and what
is done on few elements of each is done once for all.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_r2.grain import DEVICE_PIECE, Grain
from hf_r2.sharding import LocalWeight, Routine


class BesideEachOther(LocalWeight):
    """Weights that lie whole on a CPU, as one whose blocks are those of all; nothing is copied.

    Args:
        parts: the weights, whose blocks are views of them, of one dtype.
    """

    def __init__(self, parts: Sequence[LocalWeight]) -> None:
        self.parts = parts
        self.tensor = parts[0].tensor
        self.elements = [elements for part in parts for elements in part.elements]
        self._views = [block for part in parts for block in part.blocks()]
        counts = [[block.shape[0] for block in part.blocks()] for part in parts]  # quicker than len
        self.groups_of_blocks = [groups for part in counts for groups in part]
        self.groups = [sum(part) for part in counts]

    def over_groups(self, values: Tensor) -> Routine[Tensor]:
        """Add up one value per group, for each of the weights: `(weights,)`."""
        yield from ()
        if len(values) == len(self.parts):
            return values
        sums = np.add.reduceat(values.double().numpy(), np.cumsum([0, *self.groups[:-1]]))
        return torch.from_numpy(sums).to(values)

    def update_each(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of tensors of the weights' layouts, in place."""
        opened = [part.open(target) for part, target in zip(self.parts, targets, strict=True)]
        change([block for blocks, _ in opened for block in blocks])
        for _, finish in opened:
            finish()


class Stack(NamedTuple):
    """Weights that are measured and written together.

    Args:
        members: their positions among all weights.
        weight: all of them as one: on an accelerator, a copy with their groups one after the other.
        strength: of each of them: a number, of a single one a scalar tensor, or one per weight, `(weights,)`.
    """

    members: list[int]
    weight: LocalWeight
    strength: Tensor | float

    def update(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of tensors of the weights' layouts, one per member, in place."""
        if isinstance(self.weight, BesideEachOther):
            self.weight.update_each(targets, change)
            return
        if len(targets) == 1:
            self.weight.update(targets[0], change)
            return
        together = torch.cat([target.reshape(-1, *self.weight.shape[1:]) for target in targets])
        self.weight.update(together, change)
        parts = together.chunk(len(targets))
        torch._foreach_copy_(list(targets), [p.reshape(t.shape) for p, t in zip(parts, targets, strict=True)])

    def cut(self, values: Tensor) -> list[Tensor]:
        """Cut one value per group to those of each member."""
        if isinstance(self.weight, BesideEachOther):
            return list(values.split(self.weight.groups))
        return list(values.chunk(len(self.members)))

    def per_group(self, values: Tensor | float) -> Tensor | float:
        """Repeat values, one per member, for all groups of theirs; leave a single one as it is."""
        if not isinstance(values, Tensor) or values.dim() == 0:
            return values
        return values.repeat_interleave(torch.tensor(self.weight.groups))


def stack_alike(weights: Sequence[Tensor], grain: Grain, strengths: Sequence[Tensor | float]) -> list[Stack]:
    """Put weights of one dtype, device and strength together, up to `DEVICE_PIECE` elements.

    On an accelerator they are of one shape, too, and those whose strengths are tensors stay alone. On a CPU, those do
    whose blocks are copies; and everywhere, those that are cut over processes.

    Args:
        weights: output channels first.
        grain: see [`hf_r2.grain.parse_grain`].
        strengths: one per weight.
    """
    held = [LocalWeight(weight, grain) for weight in weights]
    alike: dict[object, list[int]] = {}
    for index, (weight, local, strength) in enumerate(zip(weights, held, strengths, strict=True)):
        key = None if isinstance(weight, DTensor) else _likeness(weight, local, strength)
        alike.setdefault(index if key is None else key, []).append(index)
    stacks = []
    for members in alike.values():
        for some in _portions(members, weights):
            together = _together([weights[index] for index in some], [held[index] for index in some])
            strength = strengths[some[0]]
            if isinstance(strength, Tensor) and len(some) > 1:
                strength = torch.stack([strengths[index] for index in some]).to(together.tensor.device)
            stacks.append(Stack(some, together, strength))
    return stacks


def _likeness(weight: Tensor, local: LocalWeight, strength: Tensor | float) -> object | None:
    """Return what weights share that are worked on as one; None for one that stays alone."""
    if _on_cpu(weight):
        return (weight.dtype, strength if isinstance(strength, float) else None) if local.in_place else None
    # A second block, the short last groups of all channels, would come between the members
    alike = isinstance(strength, float) and len(local.elements) == 1
    return (weight.shape, weight.dtype, weight.device, strength) if alike else None


def _portions(members: Sequence[int], weights: Sequence[Tensor]) -> list[list[int]]:
    portions: list[list[int]] = []
    room = 0
    for index in members:
        elements = weights[index].numel()
        if not portions or elements > room:
            portions.append([])
            room = DEVICE_PIECE
        portions[-1].append(index)
        room -= elements
    return portions


def _together(weights: Sequence[Tensor], held: Sequence[LocalWeight]) -> LocalWeight:
    if len(weights) == 1:
        return held[0]
    if _on_cpu(weights[0]):
        return BesideEachOther(held)
    if held[0].grain == "tensor":
        # Each becomes one output channel: its only group
        return LocalWeight(torch.stack([weight.detach().flatten() for weight in weights]), "channel")
    return LocalWeight(torch.cat([weight.detach() for weight in weights]), held[0].grain)


def _on_cpu(weight: Tensor) -> bool:
    """Tell whether weights are worked on where they are; a copy costs more there than many kernels do."""
    return weight.is_cpu
