"""Many blocks on a device, cut into tiles that one kernel works on, whatever blocks they are of."""

from collections.abc import Sequence
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from hf_r2.tiles.recorded import on_device

_AREA = 4096
"""Elements of a tile."""

_WIDTHS = (16, 64, 256, 1024, _AREA)
"""Columns of a tile: as many as repay the kernels of their own that the rows of each width need."""

_WARPS = 8

_WIDE = 1024
"""Slots that are folded at a time."""

_LOWEST_STEPS, _SAMPLE_STEPS, _STEPS = 12, 24, 6
"""Newton's steps towards a level, at most: on the tiles' largest magnitudes, on a sample, and on all elements. There
the host cannot look whether fewer would do, but groups that are settled are not read. From a sample of 4,096 a normal
weight of two million elements takes three, or five if some hundreds stand out, a flattened one two."""


def can_be_tiled(tensor: Tensor) -> bool:
    """Tell whether kernels can work on what a tensor holds, in the order in which it lies in memory."""
    floats = tensor.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return floats and tensor.is_contiguous() and tensor.numel() > 0 and tensor.is_cuda and _has_triton(tensor.device)


@cache
def _has_triton(device: torch.device) -> bool:
    """Tell whether Triton is there, which comes with torch for Linux, and knows the device."""
    return find_spec("triton") is not None and torch.cuda.get_device_capability(device) >= (7, 0)


class Tiles:
    """Blocks of one dtype on one device.

    Groups are counted through the blocks; what is said of them has their number as its last dimension, unless another
    shape is given. Nothing here makes the host wait for the device.

    Args:
        blocks: contiguous, `(groups, elements)` each, float32, bfloat16 or float16.

    Attributes:
        groups: how many there are.
        elements: of each group, float64.
    """

    def __init__(self, blocks: Sequence[Tensor]) -> None:
        self._blocks = blocks  # whose memory the kernels are told of
        self._device = blocks[0].device
        self._dtype = _triton_dtype(blocks[0].dtype)
        shapes = np.array([block.shape for block in blocks])
        groups, n = shapes.T
        widths = np.array(_WIDTHS)[np.searchsorted(_WIDTHS, np.minimum(n, _AREA))]
        tiles = -(-n // widths)
        programs = -(-groups // (_AREA // widths)) * tiles
        first_programs = np.zeros(len(blocks), np.int64)
        self._launches = []
        for width in sorted(set(widths.tolist())):
            (members,) = np.nonzero(widths == width)
            first_programs[members] = _before(programs[members])
            owners = self._move(np.repeat(members, programs[members]).astype(np.int32))
            self._launches.append((owners, _AREA // width, width))
        fields = [n, groups, first_programs, tiles, _before(groups), _before(groups * tiles)]
        self._layout = self._move(np.stack(fields, axis=1))
        self._starts = self._move(np.append(0, np.cumsum(np.repeat(tiles, groups))))
        self.groups, self._slots = int(groups.sum()), int((groups * tiles).sum())
        self.elements = self._move(np.repeat(n, groups).astype(np.float64))
        self._addresses = self._move(np.array(_addresses(blocks)))
        self._aim, self._targets = _addresses(blocks), self._addresses.clone()

    def largest(self) -> tuple[Tensor, Tensor, Tensor]:
        """Find the largest magnitude of each group.

        Returns:
            The magnitudes and how many elements have them, `(groups,)` in float32, and what [`add_largest`] needs.
        """
        tops, counts = torch.empty(2, self._slots, dtype=torch.int32, device=self._device).unbind()
        self._launch("largest", tops, counts)
        top = torch.empty(self.groups, dtype=torch.int32, device=self._device)
        count = torch.empty(self.groups, device=self._device)
        self._fold("fold_largest", tops, counts, top, count)
        return top.view(torch.float32), count, tops

    def add_largest(self, targets: Sequence[Tensor], tops: Tensor, wanted: Tensor, shares: Tensor) -> None:
        """Add share × sign(W) to the elements whose magnitude is the one wanted in their group.

        Args:
            targets: tensors that lie in memory as the blocks do, and have their dtype.
            tops: what [`largest`] found for the tiles.
            wanted: magnitudes not below the largest of their group, float32.
            shares: float32.
        """
        self._launch("add_largest", self.aim(targets), tops, wanted.view(torch.int32), shares)

    def ends_and_squares(self) -> Tensor:
        """Return largest elements, smallest with their signs turned, and sums of squares: `(3, groups)`, float64."""
        return self._reduce("ends", 3, torch.float64, maxima=2)

    def excess(self, level: Tensor) -> tuple[Tensor, Tensor]:
        """Sum what stands above a float32 level and count the elements that do: `(2, groups)` in float64.

        Returns:
            These, and what [`add_signs_outside`] needs.
        """
        partials = self._partials(2, torch.float32)
        self._launch("excess", partials, self._slots, level, level, level, SEARCHING=False)
        return self._folded(partials), partials[1]

    def add_signs_outside(self, targets: Sequence[Tensor], counts: Tensor, level: Tensor, scales: Tensor) -> None:
        """Add scale × sign(W) to the elements above the level that [`excess`] was asked for; all float32."""
        self._launch("add_signs_outside", self.aim(targets), counts, level, scales)

    def level_of(self, ranks: Tensor) -> tuple[Tensor, Tensor]:
        """Find the magnitude of each group that as many elements reach as its rank says, and how many really do.

        By digits of four bits, the highest first.

        Args:
            ranks: 1 for the largest, float64.

        Returns:
            Magnitudes, float32, and counts, float64.
        """
        prefix = torch.zeros(self.groups, dtype=torch.int32, device=self._device)
        reached = torch.zeros_like(ranks)
        for shift in range(28, -1, -4):
            counts = self._reduce("count_from", 15, torch.float32, prefix, shift)
            counts = counts[: (1 << (31 - shift)) - 1]  # the first digit has three bits
            digit = (counts >= ranks).sum(dim=0)
            found = counts.gather(0, (digit - 1).clamp_min(0)[None])[0]
            reached = torch.where(digit > 0, found, reached)
            prefix += (digit << shift).int()
        return prefix.view(torch.float32), torch.where(prefix > 0, reached, self.elements)

    def add_signs_from(self, targets: Sequence[Tensor], level: Tensor, scales: Tensor, scales_at: Tensor) -> None:
        """Add scale × sign(W) to the elements above a level, and another scale's to those at it; all float32."""
        self._launch("add_signs_from", self.aim(targets), level, scales, scales_at)

    def soft_sums(self, rates: Tensor, bounds: Tensor) -> Tensor:
        """Sum `e`, `e·d` and `e·d²`, `e = exp(−rate · d)`, over the distances d from both ends: `(6, groups)`, float64.

        Args:
            rates: float32.
            bounds: high and low ends, `(groups, 2)`, float32.
        """
        return self._reduce("soft_sums", 6, torch.float32, rates, bounds)

    def add_soft_gradient(self, targets: Sequence[Tensor], rates: Tensor, bounds: Tensor, coefficients: Tensor) -> None:
        """Add `e · (c0 − c1 · d)` of the high end, and take away that of the low end.

        Args:
            targets: see [`add_largest`].
            rates: see [`soft_sums`].
            bounds: see there.
            coefficients: c0 and c1 of both ends, `(groups, 4)`, float32.
        """
        self._launch("add_soft_gradient", self.aim(targets), rates, bounds, coefficients)

    def moments(self, units: Tensor, centres: Tensor) -> Tensor:
        """Sum the powers 1 to 4 of `unit · (W − centre)`: `(4, groups)` in float64, from float32."""
        return self._reduce("moments", 4, torch.float32, units, centres)

    def add_kurtosis_gradient(self, targets: Sequence[Tensor], terms: Tensor) -> None:
        """Add `factor · (x · (x² − linear) − cube)` with `x = unit · (W − mean)`.

        Args:
            targets: see [`add_largest`].
            terms: factor, cube, linear, mean and unit, `(groups, 5)`, float32.
        """
        self._launch("add_kurtosis_gradient", self.aim(targets), terms)

    def level_above(self, amounts: Tensor) -> tuple[Tensor, Tensor]:
        """Find the level above which a group's magnitudes stand out by an amount in total, or 0.

        Args:
            amounts: float64.

        Returns:
            Levels, float32, and what [`clamp`] needs to leave alone what lies below.
        """
        tops, counts = torch.empty(2, self._slots, dtype=torch.int32, device=self._device).unbind()
        self._launch("largest", tops, counts)
        lowest = torch.empty(self.groups, device=self._device)
        self._fold("lowest_level", tops, amounts, lowest, STEPS=_LOWEST_STEPS)
        level = lowest.clone()
        self._launch("sampled_level", amounts, level, STEPS=_SAMPLE_STEPS)
        if self._slots == self.groups:  # the sample is all
            return level, tops
        settled = torch.zeros(self.groups, dtype=torch.int32, device=self._device)
        partials = self._partials(2, torch.float32)
        for _ in range(_STEPS):
            self._launch("excess", partials, self._slots, level, tops, settled, SEARCHING=True)
            self._fold("newton_step", partials, self._slots, amounts, lowest, level, settled)
        return level, tops

    def clamp(self, level: Tensor, share: Tensor | None = None, tops: Tensor | None = None) -> None:
        """Limit the blocks' magnitudes to a level, or go a share of the way there; both float32."""
        rest = level if share is None else share, level if tops is None else tops
        self._launch("clamp", level, *rest, SHARED=share is not None, SKIPPING=tops is not None)

    def totals(self, values: Tensor, starts: Tensor) -> Tensor:
        """Add up values of neighbouring groups, from each start to the next: float64."""
        result = torch.empty(len(starts) - 1, dtype=torch.float64, device=self._device)
        self._fold_columns(starts, values[None], result[None])
        return result

    def _reduce(
        self, kernel: str, columns: int, dtype: torch.dtype, *arguments: Tensor | int, maxima: int = 0
    ) -> Tensor:
        partials = self._partials(columns, dtype)
        self._launch(kernel, partials, self._slots, *arguments)
        return self._folded(partials, maxima)

    def _partials(self, columns: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(columns, self._slots, dtype=dtype, device=self._device)

    def _folded(self, partials: Tensor, maxima: int = 0) -> Tensor:
        if self._slots == self.groups:  # one tile for each
            return partials.double()
        result = torch.empty(len(partials), self.groups, dtype=torch.float64, device=self._device)
        self._fold_columns(self._starts, partials, result, maxima)
        return result

    def _fold_columns(self, starts: Tensor, partials: Tensor, result: Tensor, maxima: int = 0) -> None:
        columns, segments = result.shape
        with on_device(self._device):
            _kernels().fold[(segments, columns)](
                starts, partials, result, partials.shape[1], segments, MAXIMA=maxima, WIDE=_WIDE
            )

    def _fold(self, kernel: str, *arguments: Any, **flags: Any) -> None:
        """Launch a kernel for each group."""
        with on_device(self._device):
            getattr(_kernels(), kernel)[(self.groups,)](self._starts, *arguments, WIDE=_WIDE, **flags)

    def _launch(self, kernel: str, *arguments: Any, **flags: Any) -> None:
        """Launch a kernel for the tiles of each width."""
        arguments = [each.contiguous() if isinstance(each, Tensor) else each for each in arguments]
        shared = {"DTYPE": self._dtype, "num_warps": _WARPS, **flags}
        with on_device(self._device):
            for owners, rows, columns in self._launches:
                getattr(_kernels(), kernel)[(len(owners),)](
                    self._layout, owners, self._addresses, *arguments, ROWS=rows, COLUMNS=columns, **shared
                )

    def aim(self, targets: Sequence[Tensor]) -> Tensor:
        """Tell the device where targets lie, at a place that stays the same; return it."""
        addresses = _addresses(targets)
        if addresses != self._aim:
            self._targets.copy_(torch.from_numpy(np.array(addresses)), non_blocking=True)
            self._aim = addresses
        return self._targets

    def _move(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values).to(self._device, non_blocking=True)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors]


def _before(counts: np.ndarray) -> np.ndarray:
    """Sum of the counts before each."""
    return np.cumsum(counts) - counts


@cache
def _kernels() -> Any:
    from hf_r2.tiles import kernels

    return kernels


def _triton_dtype(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[dtype]
