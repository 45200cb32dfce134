"""K-means of vectors, the tables of palettes whose codes name several weights at once.

A start by k-means++ (Arthur and Vassilvitskii, 2007: every next centre is a point drawn with probability proportional
to its squared distance from those before), then Lloyd's algorithm. Distances are summed in float64 from the differences
themselves, dimension by dimension: not by `|x|² − 2·x·c + |c|²`, which loses the digits that tell near centres apart.
The same points give the same tables on every machine.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

SAMPLE = 1 << 15
"""Vectors of a group that the start is drawn from; Lloyd's algorithm then runs on all of them."""

_BAND_POINTS = 1 << 20  # points of whole groups clustered together, which bounds the memory
_CPU_PAIRS, _DEVICE_PAIRS = 1 << 18, 1 << 24  # float64 distances held at a time: 2 MB, in a core's cache
_MOST_PASSES, _FEWEST_PASSES = 64, 10
_GROUP_WORK = 1 << 32  # differences of a group's passes together: 16 passes of 2^18 points, 2^8 centres, 4 dimensions


@torch.no_grad()
def kmeans_vectors(vectors: Tensor, k: int) -> Tensor:
    """Cluster the vectors of every group.

    Groups do not depend on each other, and a group of at most k distinct vectors gets exactly these. Solved on the CPU.

    Args:
        vectors: `(groups, m, d)`, any float dtype; solved in float64.
        k: number of clusters, 1–256. Groups with fewer distinct vectors repeat some of them.

    Returns:
        Cluster means in lexicographic order, float32, `(groups, k, d)`, on the device of the vectors.
    """
    _, m, d = vectors.shape
    passes = min(_MOST_PASSES, max(_FEWEST_PASSES, _GROUP_WORK // (m * k * d)))
    tables = [_lloyd(band, _start(band, k), passes).float() for band in vectors.cpu().split(max(1, _BAND_POINTS // m))]
    return _lexicographic(torch.cat(tables)).to(vectors.device)


@torch.no_grad()
def nearest_vector(vectors: Tensor, table: Tensor) -> Tensor:
    """Index of the nearest entry of its group's table for every vector.

    Args:
        vectors: `(groups, m, d)`, any float dtype.
        table: `(groups, k, d)`, any order, k at most 256.

    Returns:
        uint8 of shape `(groups, m)`; the lowest index among entries at equal distance.
    """
    return _nearest(vectors, table)[0]


def _nearest(vectors: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Codes `(groups, m)` of the nearest entries and their squared distances in float64."""
    groups, m, d = vectors.shape
    codes = torch.empty((groups, m), dtype=torch.uint8, device=vectors.device)
    distances = torch.empty((groups, m), dtype=torch.float64, device=vectors.device)
    for band, span in _pieces(groups, m, _CPU_PAIRS if vectors.is_cpu else _DEVICE_PAIRS, table.shape[1]):
        points, entries = vectors[band, span, None].double(), table[band, None].double()
        # Squared, then added: each rounded by itself, so that equal entries stay equally far however the loop is run
        squares = (points[..., 0] - entries[..., 0]).square_()
        for axis in range(1, d):
            squares.add_((points[..., axis] - entries[..., axis]).square_())
        least, index = squares.min(dim=2)
        codes[band, span], distances[band, span] = index.to(torch.uint8), least
    return codes, distances


def _pieces(groups: int, m: int, pairs: int, k: int) -> Iterator[tuple[slice, slice]]:
    """Walk over groups and their points so that a piece has at most this many pairs of a point and an entry."""
    rows, columns = max(1, pairs // (m * k)), max(1, pairs // k)
    for first in range(0, groups, rows):
        for start in range(0, m, columns):
            yield slice(first, first + rows), slice(start, start + columns)


def _start(vectors: Tensor, k: int) -> Tensor:
    """Draw k points of each group by k-means++, as float64 `(groups, k, d)`."""
    groups, m, d = vectors.shape
    generator = torch.Generator().manual_seed(0)
    if m > SAMPLE:
        vectors = vectors[:, torch.randint(m, (SAMPLE,), generator=generator)]
    draws = torch.rand(k, dtype=torch.float64, generator=generator)
    centres = torch.empty((groups, k, d), dtype=torch.float64)
    distances = torch.ones(vectors.shape[:2], dtype=torch.float64)
    for index in range(k):
        # A point of distance zero has no share of the cumulative sum and is not drawn while there are others
        shares = distances.cumsum(dim=1)
        drawn = torch.searchsorted(shares, draws[index] * shares[:, -1:], right=True).clamp_max(shares.shape[1] - 1)
        centres[:, index] = vectors[torch.arange(groups), drawn[:, 0]]
        latest = _nearest(vectors, centres[:, index : index + 1])[1]
        distances = torch.minimum(distances, latest) if index else latest
        if not distances.any():
            centres[:, index + 1 :] = vectors[:, -1:]  # what further draws would find
            break
    return centres


def _lloyd(vectors: Tensor, centres: Tensor, passes: int) -> Tensor:
    """Move centres to the means of their points until no point changes its centre; groups that are done drop out."""
    result = centres.clone()
    active = torch.arange(len(vectors))
    codes = None
    for _ in range(passes):
        latest, distances = _nearest(vectors, centres)
        if codes is not None:
            moved = (latest != codes).any(dim=1)
            if not moved.any():
                break
            if not moved.all():
                vectors, centres, latest, distances = (t[moved] for t in (vectors, centres, latest, distances))
                active = active[moved]
        codes = latest
        centres = _means(vectors, codes, centres, distances)
        result[active] = centres
    return result


def _means(vectors: Tensor, codes: Tensor, centres: Tensor, distances: Tensor) -> Tensor:
    """Means of the clusters; empty ones go to the points that are farthest from every centre."""
    groups, k, d = centres.shape
    slots = (codes + k * torch.arange(groups)[:, None]).flatten()
    sizes = torch.bincount(slots, minlength=groups * k)
    sums = [torch.bincount(slots, vectors[..., axis].flatten().double(), groups * k) for axis in range(d)]
    means = torch.stack([total / sizes.clamp_min(1) for total in sums], dim=1).view(groups, k, d)
    empty = (sizes == 0).view(groups, k)
    return _reseed(vectors, torch.where(empty[..., None], centres, means), empty, distances)


def _reseed(vectors: Tensor, centres: Tensor, empty: Tensor, distances: Tensor) -> Tensor:
    """Put empty clusters at the farthest points, one at a time: equal points are then taken only once."""
    while True:
        farthest, point = distances.max(dim=1)
        rows = (empty.any(dim=1) & (farthest > 0)).nonzero()[:, 0]
        if not len(rows):
            return centres
        slot = empty[rows].int().argmax(dim=1)
        centres[rows, slot] = vectors[rows, point[rows]].double()
        empty[rows, slot] = False
        added = _nearest(vectors[rows], centres[rows, slot][:, None])[1]
        distances[rows] = torch.minimum(distances[rows], added)


def _lexicographic(tables: Tensor) -> Tensor:
    """Sort the entries `(groups, k, d)` of every table by their first element, then the second, and so on."""
    order = torch.arange(tables.shape[1]).expand(tables.shape[:2])
    for axis in reversed(range(tables.shape[2])):
        order = order.gather(1, tables[..., axis].gather(1, order).argsort(dim=1, stable=True))
    return tables.gather(1, order[..., None].expand_as(tables))
