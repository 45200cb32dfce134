"""Optimal k-means in one dimension.

In one dimension the clusters of the best k-means are intervals of the sorted values, so dynamic programming finds the
global optimum: `D_m(j) = min_i D_{m−1}(i) + cost(i, j)`, where cost(i, j) is the squared error of the points i … j−1
around their mean. The cost is concave Monge, hence the best i never decreases with j, and all j of a layer are solved
in O(n log n) by halving strides instead of O(n²) (Wu, 1991; Grønlund et al., arXiv 1701.07204).
"""

import numpy as np
import torch
from torch import Tensor

from hf_r2.codecs.value_counts import count_values, countable

EXACT_POINTS = 2048
"""Rows up to this length are solved exactly; longer ones on this many bins, then polished on all their values."""

_CHUNK_POINTS = 1 << 20  # points of rows handled at a time, which bounds the memory of the tables
_POLISH_STEPS = 100


def kmeans_1d(values: Tensor, k: int) -> Tensor:
    """Cluster every row of a matrix.

    Args:
        values: `(rows, n)`, any float dtype; solved in float64.
        k: number of clusters, 1–256. Rows with fewer distinct values repeat some of them.

    Returns:
        Sorted cluster means, float32, `(rows, k)`, on the device of the values.
    """
    values = values.detach()
    if len(values) == 1 and countable(values.dtype, values.numel()):
        tables = [_solve_counted(*(each.numpy() for each in count_values([values], values.dtype)), k)]
    else:
        rows = max(1, _CHUNK_POINTS // min(values.shape[1], EXACT_POINTS))
        tables = [_solve(_ascending(chunk), k) for chunk in values.split(rows)]
    return torch.from_numpy(np.concatenate(tables)).to(device=values.device, dtype=torch.float32)


def _ascending(values: Tensor) -> np.ndarray:
    """Sort rows, and raise them to float64: in float32 sorting is twice as fast."""
    narrow = values.dtype != torch.float64
    return np.sort((values.float() if narrow else values).cpu().numpy(), axis=1).astype(np.float64)


def _solve_counted(values: np.ndarray, counts: np.ndarray, k: int) -> np.ndarray:
    """Solve one row of which each of the ascending `(points,)` values occurs `counts` times."""
    if len(values) <= k:
        return np.concatenate([values, np.repeat(values[-1:], k - len(values))])[None]
    return _optimum(values[None], k, counts[None])


def _solve(ordered: np.ndarray, k: int) -> np.ndarray:
    rank = np.cumsum(np.diff(ordered, axis=1, prepend=ordered[:, :1]) > 0, axis=1)
    few = rank[:, -1] < k
    tables = np.repeat(ordered[:, -1:], k, axis=1)
    # Rows of at most k distinct values are their own tables, to the last bit
    row = np.flatnonzero(few)[:, None]
    tables[row, rank[few]] = ordered[few]
    if not few.all():
        tables[~few] = _optimum(ordered[~few], k)
    return tables


def _optimum(ordered: np.ndarray, k: int, counts: np.ndarray | None = None) -> np.ndarray:
    """Cluster ascending rows `(rows, n)`, of which each value counts once or as often as `counts` say."""
    # Around its mean a row's squares lose no digits to a common offset
    centre = np.average(ordered, axis=1, weights=counts, keepdims=True)
    centred = ordered - centre
    if counts is None:
        size = np.broadcast_to(np.arange(ordered.shape[1] + 1.0), (len(ordered), ordered.shape[1] + 1))
        first, second = _prefix_sums(centred), _prefix_sums(centred**2)
    else:
        size, first, second = (_prefix_sums(counts * power) for power in (1.0, centred, centred**2))
    edges = _bin_edges(ordered, size)
    at_edges = [np.take_along_axis(sums, edges, axis=1) for sums in (size, first, second)]
    cuts = np.take_along_axis(edges, _optimal_cuts(*at_edges, k), axis=1)
    if edges.shape[1] <= ordered.shape[1]:
        cuts = _polish(centred, size, first, cuts)
    # A mean lies between the ends of its cluster, whatever rounding says: a cluster of equal values is that value
    lowest = np.take_along_axis(ordered, np.minimum(cuts[:, :-1], ordered.shape[1] - 1), axis=1)
    highest = np.take_along_axis(ordered, np.maximum(cuts[:, 1:] - 1, 0), axis=1)
    means = _means(size, first, cuts, empty=centred[:, -1:]) + centre
    return np.sort(np.where(highest >= lowest, np.clip(means, lowest, highest), means), axis=1)


def _prefix_sums(values: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros((len(values), 1)), np.cumsum(values, axis=1)], axis=1)


def _bin_edges(ordered: np.ndarray, size: np.ndarray) -> np.ndarray:
    """Cut sorted rows `(rows, n)` into points: single values, or half equal-count and half equal-width bins.

    `size` has the prefix sums of how often each value occurs, `(rows, n + 1)`.

    Equal counts resolve the bulk, equal widths the tails: neither alone survives an outlier at 100 sigma.
    """
    rows, n = ordered.shape
    if n <= EXACT_POINTS:
        return np.broadcast_to(np.arange(n + 1), (rows, n + 1))
    half = EXACT_POINTS // 2
    total = int(size[0, -1])
    by_count = np.linspace(0, total, half + 1).astype(np.int64)
    if total > n:
        by_count = np.searchsorted(size[0], by_count)
    by_count = np.broadcast_to(by_count, (rows, half + 1))
    shares = np.linspace(0, 1, half + 1)[1:-1]
    by_width = np.stack([np.searchsorted(row, row[0] + (row[-1] - row[0]) * shares) for row in ordered])
    return np.sort(np.concatenate([by_count, by_width], axis=1), axis=1)


def _optimal_cuts(count: np.ndarray, first: np.ndarray, second: np.ndarray, k: int) -> np.ndarray:
    """Find the cuts of least squared error.

    Args:
        count: `(rows, points + 1)` prefix sums of the points' sizes.
        first: prefix sums of their values.
        second: prefix sums of their squares.
        k: number of clusters; empty ones are allowed.

    Returns:
        Indices of points, `(rows, k + 1)`: cluster m holds the points from cut m up to cut m + 1.
    """
    rows, points = count.shape[0], count.shape[1] - 1
    row = np.arange(rows)[:, None]
    starts = np.zeros((k, rows, points + 1), dtype=np.int32)
    error = _interval_cost(count, first, second, row, np.zeros((rows, 1), np.int64), np.arange(points + 1)[None])
    for m in range(1, k):
        starts[m], error = _next_layer(error, count, first, second)
    cuts = np.empty((rows, k + 1), dtype=np.int64)
    cuts[:, k] = points
    for m in range(k - 1, -1, -1):
        cuts[:, m] = starts[m, row[:, 0], cuts[:, m + 1]]
    return cuts


def _interval_cost(
    count: np.ndarray,
    first: np.ndarray,
    second: np.ndarray,
    row: np.ndarray,
    start: np.ndarray,
    stop: np.ndarray,
) -> np.ndarray:
    """Squared error of the points from start up to stop around their mean; an empty interval costs nothing."""
    size = count[row, stop] - count[row, start]
    total = first[row, stop] - first[row, start]
    return second[row, stop] - second[row, start] - total**2 / np.maximum(size, 1)


def _next_layer(
    error: np.ndarray, count: np.ndarray, first: np.ndarray, second: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Add one cluster: for every j the best start i of the last cluster, and the error that leaves."""
    rows, points = error.shape[0], error.shape[1] - 1
    best = np.zeros((rows, points + 1), dtype=np.int64)
    least_error = np.zeros_like(error)
    stride = 1 << (points.bit_length() - 1)
    while stride:
        # The odd multiples of the stride; their neighbours at ±stride are solved and bracket the answer
        j = np.arange(stride, points + 1, 2 * stride)
        low = best[:, j - stride]
        high = np.where(j + stride <= points, best[:, np.minimum(j + stride, points)], j)
        length = (np.minimum(high, j) - low + 1).ravel()
        begin = np.cumsum(length) - length
        problem = np.repeat(np.arange(length.size), length)
        i = np.arange(problem.size) - begin[problem] + low.ravel()[problem]
        row, stop = problem // j.size, j[problem % j.size]
        errors = error[row, i] + _interval_cost(count, first, second, row, i, stop)
        least = np.minimum.reduceat(errors, begin)
        hits = np.flatnonzero(errors == least[problem])
        hit = hits[np.searchsorted(problem[hits], np.arange(length.size))]
        best[:, j] = i[hit].reshape(low.shape)
        least_error[:, j] = least.reshape(low.shape)
        stride //= 2
    return best, least_error


def _means(size: np.ndarray, first: np.ndarray, cuts: np.ndarray, empty: np.ndarray) -> np.ndarray:
    """Means `(rows, k)` of the values between cuts `(rows, k + 1)`; empty clusters take the values given for them."""
    size, total = (np.diff(np.take_along_axis(sums, cuts, axis=1), axis=1) for sums in (size, first))
    return np.where(size > 0, total / np.maximum(size, 1), empty)


def _polish(centred: np.ndarray, size: np.ndarray, first: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Lloyd's algorithm on all sorted values, from the cuts of the binned optimum, until none of them moves."""
    values = torch.from_numpy(np.ascontiguousarray(centred))
    for _ in range(_POLISH_STEPS):
        means = np.sort(_means(size, first, cuts, empty=centred[:, -1:]), axis=1)
        midpoints = torch.from_numpy(np.ascontiguousarray((means[:, :-1] + means[:, 1:]) / 2))
        moved = torch.searchsorted(values, midpoints).numpy()
        if np.array_equal(moved, cuts[:, 1:-1]):
            break
        cuts = np.concatenate([cuts[:, :1], moved, cuts[:, -1:]], axis=1)
    return cuts
