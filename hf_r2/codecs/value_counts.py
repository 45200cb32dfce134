"""Weights of 16 bits, counted by value: at most 2^16 numbers stand for all elements, whatever their number."""

from collections.abc import Iterable

import torch
from torch import Tensor

MANY = 1 << 17
"""Elements from which on a weight of 16 bits is counted."""

_CHUNK = 1 << 20  # elements counted at a time


def countable(dtype: torch.dtype, numel: int) -> bool:
    """Tell whether a weight has so many elements of so few bits that counting them is worthwhile."""
    return dtype in (torch.bfloat16, torch.float16) and numel >= MANY


def count_values(parts: Iterable[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Count the elements of each value; both zeros are one value.

    Args:
        parts: a weight, or parts of one, of any shape.
        dtype: of the weight: bfloat16 or float16.

    Returns:
        The values that occur, ascending and in float64, and how often each does, int64: both `(values,)`, on the CPU.
    """
    counts = torch.zeros(1 << 16, dtype=torch.int64)
    for part in parts:
        for chunk in part.detach().reshape(-1).view(torch.int16).split(_CHUNK):
            counts += torch.bincount(chunk.int() + (1 << 15), minlength=1 << 16).cpu()
    values = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(dtype).double()
    zero, negative_zero = 1 << 15, 0
    counts[zero] += counts[negative_zero]
    counts[negative_zero] = 0
    occurring = counts.nonzero()[:, 0]
    values, order = values[occurring].sort()
    return values, counts[occurring][order]
