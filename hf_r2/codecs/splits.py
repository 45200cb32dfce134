"""Where to split the magnitudes of a group in two: the exact least-squares optimum.

Every solution here cuts the magnitudes in order of size. With i of n elements below the cut, of sum S out of a total T,
the squared error is Σ x² − gain(i, S), and both gains are convex functions of the point (i, S):

- two levels m_lo and m_hi, the means of the two sides: n · gain = (n·S − i·T)² / (i·(n − i)) + T²
- zero below and one level above, the mean there: gain = (T − S)² / (n − i)

The best cut is the arg-max over all n of them: iterating between means and cut, as one may for a distribution with a
density that is log-concave (Pouransari et al., arXiv 2001.02786, section 3), stops at a local optimum under outliers.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from hf_r2.cells import as_array
from hf_r2.grain import DEVICE_PIECE

LONG = 1 << 17
"""Rows from this length on are split by a histogram, on a CPU; it has nothing to gain on shorter ones."""

_SORTED = 1 << 15  # elements of rows sorted at a time: their float64 sums stay in the cache
_CHUNK = 1 << 16  # elements of a long row handled at a time
_MANTISSA = 7  # bins are 2^7 to an octave of magnitudes …
_OCTAVES = 64  # … down to 2^-64 of the largest, which anything smaller counts as
_SHIFT = 23 - _MANTISSA
_BINS = _OCTAVES << _MANTISSA
_ONE = 2.0 ** (_SHIFT + 17)  # above the sum of the last _SHIFT bits of a chunk's elements

Gain = Callable[[Tensor, Tensor, int, Tensor], Tensor]
"""Of elements below the cut, their sum, all elements and their sum; up to a constant that the cut does not change."""


class Split(NamedTuple):
    """The best cut of each group: elements below it and their sum, and the sum of all; float64, `(groups,)`."""

    count: Tensor
    first: Tensor
    total: Tensor


class Bins(NamedTuple):
    """A histogram of the magnitudes of a row, with the exact sum of every bin.

    Args:
        lowest: bits of the float32 number where the first bin begins.
        edges: float64 `(bins + 1,)`: where the bins begin and the last one ends.
        count: float64 `(bins + 1,)`: elements below each edge.
        first: float64 `(bins + 1,)`: their sum.
    """

    lowest: int
    edges: Tensor
    count: Tensor
    first: Tensor


def two_level_gain(count: Tensor, first: Tensor, n: int, total: Tensor) -> Tensor:
    """Say what a mean on each side saves over one mean of all, times n."""
    # At the ends 0 / 0; the bound of a bin asks for fractions of an element
    return first.mul(n).sub_(count * total).square_().div_((count * (n - count)).clamp_min_(1e-9))


def zero_below_gain(count: Tensor, first: Tensor, n: int, total: Tensor) -> Tensor:
    """Say what the mean above the cut saves over zeros everywhere."""
    return (total - first).square_().div_((n - count).clamp_min(1e-9))


def best_split(block: Tensor, gain: Gain) -> Split:
    """Find the cut of the magnitudes of every group that gains most.

    Args:
        block: `(groups, n)`, float32, contiguous, finite.
        gain: what a cut gains.
    """
    if block.is_cpu and block.shape[1] >= LONG:
        parts = [_split_by_bins(row, gain) for row in block]
    else:
        limit = _SORTED if block.is_cpu else DEVICE_PIECE
        rows = max(1, limit // block.shape[1])
        parts = [_split_sorted(sort_magnitudes(part), gain) for part in block.split(rows)]
    return Split(*(torch.cat(values) for values in zip(*parts, strict=True)))


def sort_magnitudes(block: Tensor) -> Tensor:
    """Sort the magnitudes of each group `(groups, n)`, ascending. NumPy sorts many times faster than torch on a CPU."""
    if not block.is_cpu:
        return block.abs().sort(dim=1).values
    return torch.from_numpy(np.sort(np.abs(as_array(block)), axis=1))


def prefix_sums(values: Tensor) -> Tensor:
    """Sum the elements of each group `(groups, n)` before every place, and all: float64 `(groups, n + 1)`."""
    sums = values.new_zeros(len(values), values.shape[1] + 1, dtype=torch.float64)
    torch.cumsum(values, dim=1, dtype=torch.float64, out=sums[:, 1:])
    return sums


def magnitude_bins(row: Tensor) -> Bins:
    """Count and sum the magnitudes of a row `(n,)`, float32 on a CPU, by bins of equal width in each octave.

    The bits of a float32 number, read as an integer, ascend with its magnitude: its exponent and the first bits of its
    mantissa name the bin, which no outlier widens and no rounding blurs. Magnitudes below 2^-64 of the largest count as
    that much, which no float32 result can tell.

    In a bin a magnitude is the lower edge and a multiple of one unit, by its last bits. So one float64 number holds
    both the count of a bin and the sum of its multiples, exactly, and one pass adds up both.
    """
    values = as_array(row)
    smallest, largest = row.aminmax()
    top = int(torch.maximum(-smallest, largest).view(torch.int32)) >> _SHIFT
    lowest = max(top - _BINS + 1, 0) << _SHIFT
    edges = torch.arange(_BINS + 1, dtype=torch.int32).mul_(1 << _SHIFT).add_(lowest).view(torch.float32)
    floor = np.float32(edges[0].item())
    count, multiples = np.zeros((2, _BINS))
    # Buffers used again and again: fresh ones cost as much in page faults as what is computed in them
    magnitudes, index, weights = (np.empty(_CHUNK, dtype) for dtype in (np.float32, np.intp, np.float64))
    for start in range(0, len(values), _CHUNK):
        chunk = values[start : start + _CHUNK]
        size = slice(len(chunk))
        np.maximum(np.abs(chunk, out=magnitudes[size]), floor, out=magnitudes[size])
        above = magnitudes[size].view(np.int32)
        above -= lowest
        np.right_shift(above, _SHIFT, out=index[size])
        above &= (1 << _SHIFT) - 1
        both = np.bincount(index[size], np.add(above, _ONE, out=weights[size]), minlength=_BINS)
        found = np.floor(both / _ONE)
        count += found
        multiples += both - found * _ONE
    edges = edges.double().nan_to_num_(posinf=2.0**128)  # the largest number's bin ends at infinity
    total = count * edges[:-1].numpy() + multiples * edges.diff().numpy() / 2**_SHIFT
    return Bins(lowest, edges, *prefix_sums(torch.from_numpy(np.stack([count, total]))))


def _split_sorted(ordered: Tensor, gain: Gain) -> Split:
    n = ordered.shape[1]
    first = prefix_sums(ordered)
    total = first[:, -1]
    count = torch.arange(n + 1, dtype=torch.float64, device=ordered.device)
    best = gain(count[:-1], first[:, :-1], n, total[:, None]).argmax(dim=1, keepdim=True)
    return Split(best[:, 0].double(), first.gather(1, best)[:, 0], total)


def _split_by_bins(row: Tensor, gain: Gain) -> Split:
    """Split a long row; only the bins that may hold the best cut are sorted.

    Between the edges of a bin the points (i, S) of the cuts lie on a curve whose slope, the magnitude, stays within the
    edges: in the triangle of the bin's two ends and of the point where its elements at the lower edge and then those at
    the upper edge would have the bin's sum. A convex gain is largest in a corner, so a bin whose third corner gains no
    more than the best end of any bin holds no better cut.
    """
    n = len(row)
    bins = magnitude_bins(row)
    total = bins.first[-1]
    ends = gain(bins.count[:-1], bins.first[:-1], n, total)
    best = int(ends.argmax())
    edges, size, inside = bins.edges, bins.count.diff(), bins.first.diff()
    at_low = ((edges[1:] * size - inside) / (edges[1:] - edges[:-1])).clamp_min_(0)
    corners = gain(bins.count[:-1] + at_low, bins.first[:-1] + edges[:-1] * at_low, n, total)
    found = bins.count[best], bins.first[best]
    doubtful = ((corners > ends[best]) & (size > 0)).nonzero()[:, 0]
    if len(doubtful):
        start, stop = int(doubtful[0]), int(doubtful[-1]) + 1
        low, high = (bins.lowest + (index << _SHIFT) for index in (start, stop))
        inner = prefix_sums(_between(row, low if start else 0, high)[None])[0] + bins.first[start]
        count = bins.count[start] + torch.arange(len(inner), dtype=torch.float64)
        gains = gain(count[:-1], inner[:-1], n, total)
        if gains.max() > ends[best]:
            found = count[gains.argmax()], inner[gains.argmax()]
    return Split(found[0][None], found[1][None], total[None])


def _between(row: Tensor, start: int, stop: int) -> Tensor:
    """Sort the magnitudes of a row whose bits, as an integer, are from start up to, but without, stop."""
    values, found = as_array(row), []
    for begin in range(0, len(values), _CHUNK):
        bits = values[begin : begin + _CHUNK].view(np.int32) & 0x7FFFFFFF  # without the sign
        # As unsigned numbers those below the start are large, and one comparison tells both ends
        found.append(bits[(bits - np.int32(start)).view(np.uint32) < stop - start])
    return torch.from_numpy(np.sort(np.concatenate(found)).view(np.float32))
