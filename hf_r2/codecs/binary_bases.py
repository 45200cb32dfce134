"""Binary bases: scales v_1 … v_k ≥ 0 of each group, whose signed sums Σ v_i s_i are the levels of its weights.

Least-squares binary quantization (Pouransari, Tu and Tuzel, arXiv 2001.02786, sections 3 and 4). The levels come in
pairs ±, so everything is solved on magnitudes:

- one bit: v = mean |x|, the optimum
- two bits: v_1 ± v_2 are the means of the large and the small magnitudes at the best split, the optimum
- ternary (v_1 = v_2 = v, levels −2v, 0, 2v): 2v is the mean of the magnitudes above the best split, the optimum
- greedy: v_i = mean of what the first i − 1 scales leave over, for any number of bits
- three bits and more: from the greedy scales, the least-squares scales of the codes and the nearest codes of the
  scales in turn; a local optimum, never worse than greedy
"""

import torch
from torch import Tensor

from hf_r2.codecs.palette import nearest
from hf_r2.codecs.splits import (
    best_split,
    magnitude_bins,
    prefix_sums,
    sort_magnitudes,
    two_level_gain,
    zero_below_gain,
)
from hf_r2.grain import EMPTY, pieces

_STEPS = 50  # of the refinement at most
_SETTLED = 1e-9  # relative gain of a step that is not worth another one
_ROWS = 1 << 18  # elements, or entries of level tables, that are refined at a time
_LONG = 1 << 20  # rows beyond this length are refined on a histogram


def solve(block: Tensor, bits: int, basis: str = "optimal") -> Tensor:
    """Find the scales of every group of least squared error.

    Args:
        block: `(groups, n)`, any float dtype, finite; solved in float32 with float64 sums.
        bits: number of scales k, 1–8; 2 for `"ternary"`.
        basis: `"optimal"` (the optimum for 1 and 2 bits, refined from greedy beyond), `"greedy"` or `"ternary"`.

    Returns:
        Scales, float32 `(groups, k)`, in units of the weight, descending but for [`greedy`]; 0 for groups of zeros.

    Raises:
        ValueError: for a block without elements.
    """
    if block.numel() == 0:
        raise ValueError(EMPTY)
    block = block.detach().float().contiguous()
    if basis == "ternary":
        return _ternary(block)
    if basis == "greedy" or bits == 1:
        return greedy(block, bits)
    return _optimal_two(block) if bits == 2 else _refined(block, greedy(block, bits))


def greedy(block: Tensor, bits: int) -> Tensor:
    """Take v_i = mean |r_{i−1}| one after another, where r_i = r_{i−1} − v_i sign(r_{i−1}) and r_0 = x (section 4).

    Only magnitudes count, | |r_{i−1}| − v_i |, and they are updated in place, each piece while it is in the cache.

    Args:
        block: `(groups, n)`, float32.
        bits: number of scales k.

    Returns:
        Scales, float32 `(groups, k)`, in the order in which the codes fold; in a group of mostly zeros a scale can
        exceed the one before it.
    """
    groups, n = block.shape
    left, scales = torch.empty_like(block), []
    for _ in range(bits):
        total = block.new_zeros(groups, dtype=torch.float64)
        for band, (piece, rest) in pieces(block, left):
            rest = rest.sub_(scales[-1][band]).abs_() if scales else torch.abs(piece, out=rest)
            total[band].add_(rest.sum(dim=1))
        scales.append(total.div_(n).float()[:, None])
    return torch.cat(scales, dim=1)


def warm_two(block: Tensor, scales: Tensor) -> Tensor:
    """Improve two-bit scales by one sweep: v_1, v_2 from the means of the magnitudes on both sides of v_1.

    One step of the fixed-point iteration of section 3, for scales that follow a weight in training. It never raises the
    error, and settles on a local optimum: begin with [`solve`].

    Args:
        block: `(groups, n)`, float32.
        scales: `(groups, 2)`. Where all magnitudes are on one side of v_1, the result is (mean |x|, 0).

    Returns:
        Scales, float32 `(groups, 2)`.
    """
    groups, n = block.shape
    threshold = scales[:, 0].float()
    total, excess, above = block.new_zeros(3, groups, dtype=torch.float64)
    buffer = block.new_empty(0)
    for band, (piece,) in pieces(block):
        magnitudes = torch.abs(piece, out=buffer.resize_(piece.shape))
        total[band].add_(magnitudes.sum(dim=1))
        magnitudes.sub_(threshold[band, None]).relu_()
        excess[band].add_(magnitudes.sum(dim=1))
        above[band].add_(magnitudes.sign_().sum(dim=1))
    high_sum = excess + above * threshold
    mean, split = total / n, (above > 0) & (above < n)
    high = torch.where(split, high_sum / above, mean)
    low = torch.where(split, (total - high_sum) / (n - above), mean)
    return _half_sum_and_difference(low, high)


def levels(basis: Tensor) -> Tensor:
    """List the levels of every code: Σ v_i (2 bit_i − 1), in float32, added in the order of i.

    Args:
        basis: float32 `(groups, k)`. Bit i − 1 of a code, least significant first, is the sign of v_i.

    Returns:
        `(groups, 2^k)`.
    """
    table = torch.zeros_like(basis[:, :1])
    for scale in basis.unbind(dim=1):
        table = torch.cat([table - scale[:, None], table + scale[:, None]], dim=1)
    return table


def fold(block: Tensor, basis: Tensor) -> Tensor:
    """Code elements by the recursion s_i = sign(x − Σ_{j<i} v_j s_j), where sign(0) = +1 (section 4).

    This names the nearest level for one bit, two bits and ternary, whose thresholds are 0 and ±v_1; at equal distance
    the greater one, except that ternary zeros have two codes.

    Args:
        block: `(groups, n)`, float32.
        basis: float32 `(groups, k)`.

    Returns:
        uint8 codes `(groups, n)`.
    """
    codes = torch.zeros(block.shape, dtype=torch.uint8, device=block.device)
    for band, (piece, code) in pieces(block, codes):
        left = piece.clone()
        for index, scale in enumerate(basis[band].unbind(dim=1)):
            positive = left >= 0
            code |= positive.to(torch.uint8) << index
            left.sub_(torch.where(positive, scale[:, None], -scale[:, None]))
    return codes


def nearest_codes(block: Tensor, basis: Tensor) -> Tensor:
    """Code elements by their nearest level; at equal distance by the smaller level.

    Args:
        block: `(groups, n)`, float32.
        basis: float32 `(groups, k)`.

    Returns:
        uint8 codes `(groups, n)`.
    """
    ordered, order = levels(basis).sort(dim=1, stable=True)
    codes = torch.empty(block.shape, dtype=torch.uint8, device=block.device)
    for band, (piece, code) in pieces(block, codes):
        code.copy_(order[band].gather(1, nearest(piece, ordered[band]).long()))
    return codes


def _optimal_two(block: Tensor) -> Tensor:
    n = block.shape[1]
    count, first, total = best_split(block, two_level_gain)
    high = (total - first) / (n - count)
    return _half_sum_and_difference(torch.where(count > 0, first / count, high), high)


def _half_sum_and_difference(low: Tensor, high: Tensor) -> Tensor:
    return torch.stack([(high + low) / 2, ((high - low) / 2).clamp_min(0)], dim=1).float()


def _ternary(block: Tensor) -> Tensor:
    count, first, total = best_split(block, zero_below_gain)
    scale = (total - first) / (2 * (block.shape[1] - count))
    return torch.stack([scale, scale], dim=1).float()


def _refined(block: Tensor, start: Tensor) -> Tensor:
    n = block.shape[1]
    if block.is_cpu and n > _LONG:
        return torch.cat([_refined_on_bins(row, scales) for row, scales in zip(block[:, None], start, strict=True)])
    rows = max(1, _ROWS // max(n, start.shape[1] << (start.shape[1] - 1)))
    parts = []
    for part, scales in zip(block.split(rows), start.split(rows), strict=True):
        ordered = sort_magnitudes(part)
        count = torch.arange(n + 1, dtype=torch.float64, device=block.device).expand(len(part), -1)
        parts.append(_alternate(ordered.double(), count, prefix_sums(ordered), scales))
    return torch.cat(parts)


def _refined_on_bins(block: Tensor, start: Tensor) -> Tensor:
    """Refine the scales of one long group, taking its histogram for it; the better of both on its own elements."""
    bins = magnitude_bins(block[0])
    refined = _alternate(bins.edges[None, :-1], bins.count[None], bins.first[None], start[None])
    candidates = torch.stack([start, refined[0]])
    return candidates[torch.stack([_error(block, basis[None]) for basis in candidates]).argmin()][None]


def _error(block: Tensor, basis: Tensor) -> Tensor:
    """Squared error of the nearest levels, summed over a block."""
    table = levels(basis)
    total = block.new_zeros((), dtype=torch.float64)
    for band, (piece,) in pieces(block):
        rounded = table[band].gather(1, nearest_codes(piece, basis[band]).long())
        total += rounded.sub_(piece).square_().sum()
    return total


def _alternate(ordered: Tensor, count: Tensor, first: Tensor, start: Tensor) -> Tensor:
    """Alternate between the nearest codes of the scales and the least-squares scales of the codes.

    Args:
        ordered: ascending magnitudes, or lower ends of bins, float64 `(groups, m)`.
        count: elements before each of them, and all: float64 `(groups, m + 1)`.
        first: their sums, likewise.
        start: scales to begin with, float32 `(groups, k)`.

    Returns:
        For each group the scales of least squared error on the way, float32 `(groups, k)`.
    """
    k = start.shape[1]
    codes = torch.arange(1, 2**k, 2, device=start.device)  # those with s_1 = +1; the others are their negatives
    signs = 2.0 * ((codes[:, None] >> torch.arange(k, device=start.device)) & 1) - 1
    signs, ordered = signs.double(), ordered.contiguous()
    best = scales = start
    least = torch.full_like(first[:, -1], torch.inf)
    ridge = 1e-9 * count[0, -1] * torch.eye(k, dtype=torch.float64, device=start.device)
    for _ in range(_STEPS):
        level = scales.double() @ signs.T
        magnitude, order = level.abs().sort(dim=1)
        cuts = torch.searchsorted(ordered, (magnitude[:, :-1] + magnitude[:, 1:]) / 2)
        cuts = torch.nn.functional.pad(torch.nn.functional.pad(cuts, (1, 0)), (0, 1), value=ordered.shape[1])
        size, total = (sums.gather(1, cuts).diff(dim=1) for sums in (count, first))
        # Up to Σ x²: what is left is ≤ 0 for any scales worth having
        error = (size * magnitude.square() - 2 * total * magnitude).sum(dim=1)
        better = error < least - _SETTLED * error.abs()
        best, least = torch.where((error < least)[:, None], scales, best), torch.minimum(error, least)
        if not better.any():
            break
        signed = signs[order] * torch.where(level < 0, -1.0, 1.0).gather(1, order)[..., None]
        products = signed.mT @ (size[..., None] * signed)
        # The ridge decides between scales that the codes do not tell apart
        scales = torch.linalg.solve(products + ridge, (signed.mT @ total[..., None])[..., 0])
        scales = scales.abs().sort(dim=1, descending=True).values.float()
    return best
