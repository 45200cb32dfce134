"""Histograms of weights in fixed bins, counted piece by piece."""

import math

import numpy as np
import torch
from torch import Tensor

from hf_r2.report.statistics import Values

BIN_WIDTH = 1 / 16
"""Width of a bin, in units of rms."""

HALF = 256
"""Bins on each side of the one that is centred at zero: they reach to ±16 rms, the outermost ones beyond."""


@torch.no_grad()
def histogram(weight: Tensor, rms: float) -> np.ndarray:
    """Count the elements of a weight in bins of rms / 16, of which the middle one is centred at zero.

    Bin i counts `round(16 · W / rms) = i − 256`, halves to even; what lies beyond ±16 rms counts in the outermost
    bins. Nothing of the weight's size is built.

    Args:
        weight: finite, any float dtype and shape.
        rms: the unit; with 0, only zeros are in the middle.

    Returns:
        Counts `(513,)`, int64.
    """
    width = rms * BIN_WIDTH or math.ulp(0.0)
    counts = torch.zeros(2 * HALF + 1, dtype=torch.float64)
    for values, times in Values(weight):
        bins = (values / width).round_().clamp_(-HALF, HALF).long() + HALF
        weights = times.double() if isinstance(times, Tensor) else None
        counts += torch.bincount(bins, weights, minlength=len(counts)).cpu()
    return counts.long().numpy()  # float64 counts exactly, up to 2^53


def reach(counts: np.ndarray) -> int:
    """Return how many bins away from the middle one the outermost occupied bin is."""
    occupied = counts.nonzero()[0]
    return int(np.abs(occupied - len(counts) // 2).max(initial=0))


def coarsened(counts: np.ndarray, within: int, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Merge neighbouring bins, the same odd number of them everywhere, so that zero stays in the middle of a bin.

    Args:
        counts: of [`histogram`].
        within: bins on each side of the middle one to keep; see [`reach`].
        most: bins to have at most, odd.

    Returns:
        Counts, and their edges in units of rms: one more.
    """
    side = most // 2
    # A merged bin on each side holds `merged` bins, and the middle one (merged − 1) / 2 on each side of zero
    merged = 1 + 2 * math.ceil(max(within - side, 0) / (2 * side + 1))
    sides = math.ceil(max(within - merged // 2, 0) / merged)
    kept = sides * merged + merged // 2
    padded = np.pad(counts, max(kept - len(counts) // 2, 0))
    middle = len(padded) // 2
    edges = (np.arange(2 * sides + 2) - sides - 0.5) * merged * BIN_WIDTH
    return padded[middle - kept : middle + kept + 1].reshape(-1, merged).sum(axis=1), edges
