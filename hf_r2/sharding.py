"""What this process holds of a weight, and how per-group statistics are put together over the processes.

A weight is either whole here or cut over processes (FSDP2's `DTensor`). Whatever needs statistics of a group is written
once, as a *routine*: a generator that works on the groups' elements held here and yields a [`Reduction`] where it needs
those of the other processes. [`run`] drives the routines of many weights in step, so that a model needs as many
collectives as one weight does. A routine yields None after a pass over a weight: the other weights' passes come first,
and then what is done on few elements of each runs back to back, which takes half the time, as it stays cached.
"""

import math
from collections.abc import Callable, Generator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, Replicate, Shard

from hf_r2.grain import EMPTY, Grain, blocks, group_counts, group_sizes, join, parse_grain
from hf_r2.tiles import Tiles

Result = TypeVar("Result")

_STATISTICS = (torch.float32, torch.float64)
"""Dtypes that statistics run in."""


class Reduction(NamedTuple):
    """Request of a routine: these values, combined over the processes that hold parts of the weight."""

    operation: str
    values: Tensor
    mesh: Any


Routine = Generator[Reduction | None, Tensor, Result]


class LocalWeight:
    """The part of a weight that this process holds.

    A cut along the output channels leaves the groups of `"channel"` and int grains whole; `"tensor"` groups, and
    channels of a weight cut along its inputs, are *spread*: their statistics are those of all processes. A weight cut
    in any other way is gathered, one at a time.

    Args:
        weight: `(out, in, …)`, a tensor or a `DTensor`, any float dtype. It is read, never written.
        grain: see [`hf_r2.grain.parse_grain`].

    Attributes:
        tensor: what is held here, output channels first (in any order for grain "tensor"), detached.
        elements: elements of a whole group, one number per block.
        spread: whether the elements of one group lie on several processes.
        tiles: what passes over the blocks are done with, if kernels of their own do them.
        repeated: what is then done again and again, as the one who does it recorded it.

    Raises:
        ValueError: for an unknown grain and an empty weight.
    """

    mesh: Any = None
    spread = False
    tiles: Tiles | None = None
    repeated: Any = None

    def __init__(self, weight: Tensor, grain: Grain) -> None:
        self.grain = parse_grain(grain)
        self.shape = tuple(weight.shape)
        if weight.numel() == 0:
            raise ValueError(EMPTY)
        self.elements = group_sizes(self.shape, self.grain)
        self._start, self._stop = 0, self.shape[0] if self.shape else 1
        weight = weight.detach()
        if isinstance(weight, DTensor):
            weight = self._localize(weight)
        # All elements of a "tensor" group count alike, so they are walked in the order in which they lie in memory
        self._order: list[int] | None = None
        if grain == "tensor" and not weight.is_contiguous():
            self._order = sorted(range(weight.dim()), key=lambda dim: -weight.stride(dim))
        self.tensor = self.ordered(weight)
        self._views: list[Tensor] | None = None

    def _localize(self, weight: DTensor) -> Tensor:
        cuts = [(dim, placement) for dim, placement in enumerate(weight.placements) if placement != Replicate()]
        by_output = len(cuts) == 1 and cuts[0][1] == Shard(0)
        by_input = len(cuts) == 1 and type(cuts[0][1]) is Shard and not by_output
        if not (by_output or (by_input and isinstance(self.grain, str))):
            return weight.full_tensor()
        mesh_dim = cuts[0][0]
        self.mesh = weight.device_mesh if weight.device_mesh.ndim == 1 else weight.device_mesh[_name(weight, mesh_dim)]
        self.spread = by_input or self.grain == "tensor"
        if not self.spread:
            # torch.chunk's cut: all processes but the last ones hold ⌈out / processes⌉ channels
            rows = -(-self.shape[0] // self.mesh.size())
            self._start = min(rows * self.mesh.get_local_rank(), self.shape[0])
            self._stop = min(self._start + rows, self.shape[0])
        return weight.to_local()

    @property
    def in_place(self) -> bool:
        """Whether the blocks are views of the weight, not copies."""
        return self.tensor.dtype in _STATISTICS and self._groups_in(self.tensor) > 0

    def as_it_lies(self, target: Tensor) -> Tensor | None:
        """View a tensor of the weight's layout as groups one after the other, of its own dtype; None if it cannot be.

        A single tensor that is not cut over processes.
        """
        ordered = self.ordered(target)
        groups = self._groups_in(ordered)
        return ordered.view(groups, ordered.numel() // groups) if groups else None

    def blocks(self) -> list[Tensor]:
        """Cut what is held here into contiguous blocks `(groups, elements)`, see [`hf_r2.grain.blocks`]."""
        if self._views is not None:
            return self._views
        parts, are_views = self._cut(self.tensor)
        if are_views:
            self._views = parts
        return parts

    def ordered(self, tensor: Tensor) -> Tensor:
        """View a tensor of the weight's layout with its dimensions in the order in which the weight lies in memory."""
        return tensor if self._order is None else tensor.permute(self._order)

    def _cut(self, tensor: Tensor) -> tuple[list[Tensor], bool]:
        """Return the blocks, and whether they are views of the tensor."""
        if tensor.numel() == 0:
            empty = tensor.new_empty(0, dtype=torch.promote_types(tensor.dtype, torch.float32))
            if self.spread:
                return [empty.view(count, 0) for count in group_counts(self.shape, self.grain)], True
            return [empty.view(0, size) for size in self.elements], True
        groups = self._groups_in(tensor) if tensor.dtype in _STATISTICS else 0
        if groups:
            return [tensor.view(groups, tensor.numel() // groups)], True
        return [block.contiguous() for block in blocks(tensor, self.grain)], False

    def _groups_in(self, tensor: Tensor) -> int:
        """Count the groups if they can be viewed in a tensor, one after the other; else 0."""
        if not tensor.is_contiguous():
            return 0
        if self.grain == "tensor":
            return 1
        inputs = math.prod(self.shape[1:])
        return tensor.shape[0] * inputs // self.elements[0] if len(self.elements) == 1 and len(self.shape) > 1 else 0

    def update(self, target: Tensor, change: Callable[[list[Tensor]], None]) -> None:
        """Let `change` write to the blocks of a tensor of the weight's layout (the weight, its gradient), in place."""
        parts, finish = self.open(target)
        change(parts)
        finish()

    def open(self, target: Tensor) -> tuple[list[Tensor], Callable[[], None]]:
        """Return the blocks of a tensor of the weight's layout, and what to call once they are written."""
        whole = isinstance(target, DTensor) and self.mesh is None
        local = target.full_tensor() if whole else target.to_local() if isinstance(target, DTensor) else target
        ordered = self.ordered(local)
        parts, are_views = self._cut(ordered)

        def finish() -> None:
            if not are_views:
                ordered.copy_(join(parts, ordered.shape, self.grain))
            if whole:
                replicated = DTensor.from_local(local, target.device_mesh, [Replicate()] * target.device_mesh.ndim)
                target.copy_(replicated.redistribute(placements=target.placements))

        return parts, finish

    # --- groups: values of the groups held here are one tensor, first dimension groups, counted through the blocks ----

    def split(self, values: Tensor) -> list[Tensor]:
        """Cut values of the groups held here to those of each block."""
        return [values] if len(self.groups_of_blocks) == 1 else list(values.split(self.groups_of_blocks))

    def per_group(self, value: Tensor | float) -> Tensor:
        """Expand a number, a scalar or one value per group held here to the latter, `(groups,)`."""
        if isinstance(value, Tensor):
            return value.to(self.tensor.device).expand(self.held_groups)
        return torch.full((self.held_groups,), value, dtype=torch.float64, device=self.tensor.device)

    @cached_property
    def groups_of_blocks(self) -> list[int]:
        """Number of the groups in each block."""
        return [len(block) for block in self.blocks()]

    @cached_property
    def held_groups(self) -> int:
        """Number of the groups held here."""
        return sum(self.groups_of_blocks)

    @cached_property
    def group_elements(self) -> Tensor | int:
        """Elements of each group as a whole, `(groups,)`; a number if all have as many."""
        if len(set(self.elements)) == 1:
            return self.elements[0]
        counts = np.repeat(self.elements, self.groups_of_blocks)
        return torch.from_numpy(counts).to(self.tensor.device)

    def held(self, values: Tensor) -> Tensor:
        """Cut one value per group of the whole weight to those of the groups held here."""
        return values if self.spread or self.mesh is None else torch.cat(self._places(values))

    def whole(self, values: Tensor) -> Routine[Tensor]:
        """Put values of the groups held here together to one per group of the whole weight: inverse of [`held`]."""
        if self.spread or self.mesh is None:
            return values
        everywhere = values.new_zeros(sum(group_counts(self.shape, self.grain)))
        for place, part in zip(self._places(everywhere), self.split(values), strict=True):
            place.copy_(part)
        return (yield Reduction("sum", everywhere, self.mesh))

    def _places(self, values: Tensor) -> list[Tensor]:
        """View, in values of all groups of the whole weight, those of the groups in each block held here."""
        parts = values.split(group_counts(self.shape, self.grain))
        per_output = [len(part) // self.shape[0] for part in parts]
        return [part[self._start * n : self._stop * n] for part, n in zip(parts, per_output, strict=True)]

    def maximum(self, values: Tensor) -> Routine[Tensor]:
        """Combine largest values of the groups."""
        return (yield Reduction("max", values, self.mesh)) if self.spread else values

    def total(self, values: Tensor) -> Routine[Tensor]:
        """Combine sums over the groups."""
        return (yield Reduction("sum", values, self.mesh)) if self.spread else values

    def gather(self, parts: Sequence[Tensor]) -> Routine[list[Tensor]]:
        """Put the rows that processes hold for the same group beside each other: `(groups, processes · columns)`.

        Args:
            parts: `(groups, columns)`, one per block.
        """
        if not self.spread:
            return list(parts)
        rank, gathered = self.mesh.get_local_rank(), []
        for part in parts:
            place = part.new_zeros(len(part), self.mesh.size(), part.shape[1])
            place[:, rank] = part
            gathered.append((yield Reduction("sum", place, self.mesh)).flatten(1))
        return gathered

    def over_groups(self, values: Tensor) -> Routine[Tensor]:
        """Add up one value per group, over all groups of the whole weight, to a scalar."""
        value = values.sum()
        if self.spread or self.mesh is None:
            return value
        return (yield Reduction("sum", value, self.mesh))


def run(routines: Sequence[Routine[Result]]) -> list[Result]:
    """Drive routines to their ends, one collective for what all of them ask at a time."""
    results: dict[int, Result] = {}
    requests: dict[int, Reduction | None] = {}

    def advance(index: int, answer: Tensor | None) -> None:
        try:
            requests[index] = routines[index].send(answer)
        except StopIteration as end:
            results[index] = end.value

    for index in range(len(routines)):
        advance(index, None)
    while requests:
        waiting = list(requests)
        answers = _reduce({index: request for index, request in requests.items() if request})
        requests.clear()
        for index in waiting:
            advance(index, answers.get(index))
    return [results[index] for index in range(len(routines))]


def cut_again(model: nn.Module) -> None:
    """Let FSDP2 free the weights that it has gathered, so that what is read now stays valid after the backward pass.

    A forward pass leaves some weights gathered, an evaluation too; FSDP2 gathers them again where it needs them.
    """
    for module in model.modules() if dist.is_initialized() else ():
        if isinstance(module, FSDPModule):
            module.reshard()


def _reduce(requests: dict[int, Reduction]) -> dict[int, Tensor]:
    answers = {}
    kinds = dict.fromkeys((request.operation, request.mesh) for request in requests.values())
    for operation, mesh in kinds:
        members = {i: r.values for i, r in requests.items() if (r.operation, r.mesh) == (operation, mesh)}
        # float64: what is exact on one process stays exact over several
        flat = torch.cat([values.reshape(-1).double().to(mesh.device_type) for values in members.values()])
        dist.all_reduce(flat, dist.ReduceOp.MAX if operation == "max" else dist.ReduceOp.SUM, group=mesh.get_group())
        parts = flat.split([values.numel() for values in members.values()])
        for (index, values), part in zip(members.items(), parts, strict=True):
            answers[index] = part.view(values.shape).to(values)
    return answers


def _name(weight: DTensor, mesh_dim: int) -> str:
    names = weight.device_mesh.mesh_dim_names
    if names is None:
        raise ValueError("the weight lies on an unnamed device mesh of several dimensions; name its dimensions")
    return names[mesh_dim]
