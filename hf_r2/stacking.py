"""Weights that are worked on as one: what would take calls for each of them is done once for all; nothing is copied."""

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_r2.grain import DEVICE_PIECE, Grain
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.tiles import Tiles, can_be_tiled


class BesideEachOther(LocalWeight):
    """Weights that lie whole on one device, as one whose blocks are those of all.

    Args:
        parts: the weights, whose blocks can be views of them, of one dtype.
        tiled: whether kernels work on all blocks at once. The blocks then have the weights' own dtype.
    """

    def __init__(self, parts: Sequence[LocalWeight], tiled: bool = False) -> None:
        self.parts = parts
        self.tensor = parts[0].tensor
        self.elements = [elements for part in parts for elements in part.elements]
        blocks = [[part.as_it_lies(part.tensor)] if tiled else part.blocks() for part in parts]
        self._views = [block for part in blocks for block in part]
        counts = [[block.shape[0] for block in part] for part in blocks]  # quicker than len
        self.groups_of_blocks = [groups for part in counts for groups in part]
        self.groups = [sum(part) for part in counts]
        self.tiles = Tiles(self._views) if tiled else None

    def over_groups(self, values: Tensor) -> Routine[Tensor]:
        """Add up one value per group, for each of the weights: `(weights,)`."""
        yield from ()
        if len(values) == len(self.parts):
            return values
        if self.tiles is not None:
            return self.tiles.totals(values, self._starts).to(values)
        sums = np.add.reduceat(values.double().numpy(), np.cumsum([0, *self.groups[:-1]]))
        return torch.from_numpy(sums).to(values)

    def repeat(self, values: Tensor) -> Tensor:
        """Repeat one value per weight for all of its groups."""
        if len(self.parts) == self.held_groups:
            return values
        return values.repeat_interleave(self._counts, output_size=self.held_groups)

    @cached_property
    def _counts(self) -> Tensor:
        return torch.tensor(self.groups, device=self.tensor.device)

    @cached_property
    def _starts(self) -> Tensor:
        return torch.tensor([0, *np.cumsum(self.groups)], device=self.tensor.device)

    def update_each(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of tensors of the weights' layouts, in place."""
        if self.tiles is not None:
            self._update_tiled(targets, change)
            return
        opened = [part.open(target) for part, target in zip(self.parts, targets, strict=True)]
        change([block for blocks, _ in opened for block in blocks])
        for _, finish in opened:
            finish()

    def _update_tiled(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to tensors that lie in memory as the weights do: the targets, or copies of them."""
        ordered = [part.ordered(target) for part, target in zip(self.parts, targets, strict=True)]
        dtype = self.tensor.dtype
        lying = [each if each.is_contiguous() and each.dtype == dtype else _contiguous(each, dtype) for each in ordered]
        change(lying)
        for target, written in zip(ordered, lying, strict=True):
            if written is not target:
                target.copy_(written)


class Stack(NamedTuple):
    """Weights that are measured and written together.

    Args:
        members: their positions among all weights.
        weight: all of them as one.
        strength: of each of them: a number, of a single one a scalar tensor, or one per weight, `(weights,)`.
    """

    members: list[int]
    weight: LocalWeight
    strength: Tensor | float

    def update(self, targets: Sequence[Tensor], change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of tensors of the weights' layouts, one per member, in place."""
        if isinstance(self.weight, BesideEachOther):
            self.weight.update_each(targets, change)
        else:
            self.weight.update(targets[0], change)

    def cut(self, values: Tensor) -> list[Tensor]:
        """Cut one value per group to those of each member."""
        return list(values.split(self.weight.groups)) if isinstance(self.weight, BesideEachOther) else [values]

    def per_group(self, values: Tensor | float) -> Tensor | float:
        """Repeat values, one per member, for all groups of theirs; leave a single one as it is."""
        if not isinstance(values, Tensor) or values.dim() == 0:
            return values
        return self.weight.repeat(values)


class Stacker:
    """Puts weights together, and leaves them so while they lie where they did.

    Args:
        grain: see [`hf_r2.grain.parse_grain`].
    """

    def __init__(self, grain: Grain) -> None:
        self.grain = grain
        self._places: object = None
        self._together: list[tuple[list[int], LocalWeight]] = []

    def __getstate__(self) -> dict[str, Grain]:
        """Let a copy put its own weights together."""
        return {"grain": self.grain}

    def __setstate__(self, state: dict[str, Grain]) -> None:
        self.__init__(state["grain"])

    def stack(self, weights: Sequence[Tensor], strength: Tensor | float) -> list[Stack]:
        """Put weights, output channels first, together; the strength is one for all or one per weight."""
        # What is computed from parameters is new at every step, and held on to no longer
        lasting = all(type(weight) is nn.Parameter or type(weight._base) is nn.Parameter for weight in weights)
        places = ([w.data_ptr() for w in weights], [w.shape for w in weights]) if lasting else None
        if places is None or places != self._places:
            self._places, self._together = places, put_together(weights, self.grain)
        stacks = [Stack(members, weight, _part(strength, members, weight)) for members, weight in self._together]
        if not lasting:
            self._together = []
        return stacks


def put_together(weights: Sequence[Tensor], grain: Grain) -> list[tuple[list[int], LocalWeight]]:
    """Put weights of one dtype and device together, on a CPU up to `DEVICE_PIECE` elements; return who is where.

    Those stay alone whose blocks would be copies, those that are cut over processes, and on a device those that there
    are no kernels for.

    Args:
        weights: output channels first.
        grain: see [`hf_r2.grain.parse_grain`].
    """
    held = [LocalWeight(weight, grain) for weight in weights]
    alike: dict[object, list[int]] = {}
    for index, (weight, local) in enumerate(zip(weights, held, strict=True)):
        key = None if isinstance(weight, DTensor) else _likeness(local)
        alike.setdefault(index if key is None else key, []).append(index)
    together = []
    for key, members in alike.items():
        first = held[members[0]]
        if key == members[0]:  # alone
            together.append((members, first))
        elif not _on_cpu(first.tensor):
            together.append((members, BesideEachOther([held[index] for index in members], tiled=True)))
        else:
            for some in _portions(members, weights):
                parts = [held[index] for index in some]
                together.append((some, BesideEachOther(parts) if len(parts) > 1 else parts[0]))
    return together


def _likeness(local: LocalWeight) -> tuple | None:
    """Return what weights share that are worked on as one; None for one that stays alone."""
    if _on_cpu(local.tensor):
        return (local.tensor.dtype,) if local.in_place else None
    alike = can_be_tiled(local.tensor) and local.as_it_lies(local.tensor) is not None
    return (local.tensor.dtype, local.tensor.device) if alike else None


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


def _part(strength: Tensor | float, members: Sequence[int], weight: LocalWeight) -> Tensor | float:
    """Pick the strengths of some weights, on their device."""
    if not isinstance(strength, Tensor):
        return strength
    part = strength if strength.dim() == 0 else strength[members[0] if len(members) == 1 else members]
    return part.to(weight.tensor.device, non_blocking=True)


def _contiguous(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype).contiguous()


def _on_cpu(weight: Tensor) -> bool:
    """Tell whether passes are made by calls that a host waits for."""
    return weight.is_cpu
