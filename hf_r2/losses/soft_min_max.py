"""The soft-min-max range loss."""

from collections.abc import Iterable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.fusing import fused
from hf_r2.grain import Grain, group_counts, pieces
from hf_r2.losses.term import Measure, Measured, range_term
from hf_r2.moments import extremes_and_rms
from hf_r2.sharding import LocalWeight, Routine
from hf_r2.stacking import Stacker

LOWEST_START, HIGHEST_START = 1.0, 100.0
"""Between these a first temperature is sought. At 100 only groups whose largest elements nearly tie see less than
all."""


def soft_min_max(weight: Tensor, temperature: Tensor | float, grain: Grain = "tensor") -> Tensor:
    """Smooth range of a weight: `Σ_groups rms · [ s_max − s_min + e^{−a} ]`.

    With `U = W / rms(W)` (rms of the group, detached), `s_max = Σ_i U_i p_i` where `p = softmax(a U)`, and
    `s_min = Σ_i U_i q_i` where `q = softmax(−a U)`. `e^{−a}` pushes a learnable temperature up, towards the hard range.
    Because a works on U, it means the same for every weight: 5 sees about 90 % of the range of weights with a normal
    distribution, whether they are of size 0.02 or 1; on W itself a fixed temperature sees 3 % at 0.02.
    Source: soft-min-max R2 of Kundu et al., arXiv 2303.08253, in this project's working definition; the division by
    the rms is this project's.

    Args:
        weight: `(out, in, …)`, any float dtype; computed in float32 or better.
        temperature: a, dimensionless: a number, or one value per group, shape `(groups,)`.
        grain: the groups whose range is restricted.

    Returns:
        Scalar in units of the weight.
    """
    dtype = torch.promote_types(weight.dtype, torch.float32)
    temperatures = torch.as_tensor(temperature, dtype=dtype, device=weight.device)
    return range_term(
        soft_min_max_measure(), Stacker(grain), [weight], [temperatures.expand(sum(group_counts(weight.shape, grain)))]
    )


def soft_min_max_measure(compiled: bool = False) -> Measure:
    """Return the routine, which takes a weight and its temperatures; see [`soft_min_max`].

    Args:
        compiled: fuse its two passes of exponentials with `torch.compile`.
    """
    return partial(_measure, compiled)


def _measure(compiled: bool, weight: LocalWeight, temperatures: Tensor) -> Routine[Measured]:
    a = weight.held(temperatures).to(weight.tensor.device)
    bounds, size = yield from extremes_and_rms(weight, compiled)
    rates = _rate(a, size)
    high, low = yield from _soft_ends(weight, rates, bounds, compiled)
    penalty = size * torch.exp(-a)
    soft_range = bounds[:, 0] - bounds[:, 1] - (high.distance + low.distance)
    value = yield from weight.over_groups(soft_range.to(size.dtype) + penalty)
    # d s_max / da is the variance of U under p, −d s_min / da that under q
    variance = torch.where(size > 0, (high.variance + low.variance) / size, 0)
    learned = yield from weight.whole(variance.to(size.dtype) - penalty)

    def add_gradient(grads: Sequence[Tensor], scale: Tensor | float) -> None:
        coefficients = torch.cat([end.coefficients(rates) for end in (high, low)], dim=1)
        coefficients = (coefficients * weight.per_group(scale)[:, None]).to(size.dtype)
        if weight.tiles is not None:
            weight.tiles.add_soft_gradient(grads, rates, bounds, coefficients)
            return
        add = fused(_add_gradient) if compiled else _add_gradient
        of_blocks = map(weight.split, (rates, bounds, coefficients, _once(rates, bounds)))
        for block, grad, rate, bound, c, once in zip(weight.blocks(), grads, *of_blocks, strict=True):
            once = bool(once.all())
            for band, (piece, target) in _walk(compiled, block, grad):
                add(target, piece, rate[band, None], bound[band], c[band], once)

    return Measured(value, add_gradient, learned.to(temperatures))


def first_temperature(weight: LocalWeight, share: float = 0.9) -> Routine[Tensor]:
    """Find the temperature at which soft-min-max sees a share of each group's range, `(groups,)`, by bisection."""
    bounds, size = yield from extremes_and_rms(weight, compiled=False)
    lowest, highest = torch.full_like(size, LOWEST_START), torch.full_like(size, HIGHEST_START)
    # Halving the logarithm of a factor of 100 eight times leaves one of 1.02
    for _ in range(8):
        middle = (lowest * highest).sqrt()
        high, low = yield from _soft_ends(weight, _rate(middle, size), bounds, compiled=False)
        enough = high.distance + low.distance <= (1 - share) * (bounds[:, 0] - bounds[:, 1])
        highest, lowest = torch.where(enough, middle, highest), torch.where(enough, lowest, middle)
    return (yield from weight.whole(highest))


class _SoftEnd(NamedTuple):
    """One soft end of each group's range, `(groups,)` in float64, with d the distances from the hard end.

    Args:
        total: `Σ e^{−rate · d}`.
        distance: mean of d under these weights: how far the soft end lies inside the hard one.
        variance: of d under these weights.
    """

    total: Tensor
    distance: Tensor
    variance: Tensor

    @classmethod
    def of(cls, sums: Tensor) -> "_SoftEnd":
        """From sums of `e`, `e·d` and `e·d²`, `(groups, 3)`."""
        total, first, second = sums.unbind(dim=1)
        return cls(total, first / total, (second / total - (first / total).square()).clamp_min(0))

    def coefficients(self, rate: Tensor) -> Tensor:
        """`p · [1 + a(U − s_max)]` and its counterpart are `e · (c0 − c1 · d)`: c0 and c1, `(groups, 2)`."""
        return torch.stack([(1 + rate * self.distance) / self.total, rate / self.total], dim=1)


def _rate(temperature: Tensor, size: Tensor) -> Tensor:
    """Return a / rms, the factor of W in the exponents; a group of zeros has no range to see at any."""
    return torch.where(size > 0, temperature / size, 0)


def _soft_ends(
    weight: LocalWeight, rates: Tensor, bounds: Tensor, compiled: bool
) -> Routine[tuple[_SoftEnd, _SoftEnd]]:
    if weight.tiles is not None:
        sums = weight.tiles.soft_sums(rates, bounds).T
        return _SoftEnd.of(sums[:, :3]), _SoftEnd.of(sums[:, 3:])
    kernel = fused(_exponential_sums) if compiled else _exponential_sums
    sums = torch.zeros(len(rates), 6, dtype=torch.float64, device=rates.device)
    of_blocks = map(weight.split, (rates, bounds, sums, _once(rates, bounds)))
    for block, rate, bound, total, once in zip(weight.blocks(), *of_blocks, strict=True):
        once = bool(once.all())
        for band, (piece,) in _walk(compiled, block):
            total[band] += kernel(piece, rate[band, None], bound[band], once)
    sums = yield from weight.total(sums)
    return _SoftEnd.of(sums[:, :3]), _SoftEnd.of(sums[:, 3:])


def _once(rates: Tensor, bounds: Tensor) -> Tensor:
    """Tell for which groups one exponential serves both ends: neither it nor its reciprocal leaves float32."""
    if not rates.is_cpu:  # where the host would have to wait to learn it
        return torch.zeros(len(rates), dtype=torch.bool)
    return rates * (bounds[:, 0] - bounds[:, 1]) < 80


def _exponentials(piece: Tensor, rate: Tensor, bound: Tensor, once: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Distances from the high and the low end, and their exponentials."""
    high, low = bound[:, :1] - piece, piece - bound[:, 1:]
    e_high = _exp(high * -rate)
    e_low = torch.exp((bound[:, :1] - bound[:, 1:]) * -rate) / e_high if once else _exp(low * -rate)
    return high, low, e_high, e_low


def _exp(exponents: Tensor) -> Tensor:
    """Exponentials of numbers ≤ 0; on a CPU by powers of 2, at half the time, and those below 1e-38 are 1e-38.

    In a fused pass `2^(k + f)`, with k whole and |f| ≤ 1/2: a polynomial fitted to 2^f, to 2e-7 of it, times 2^k by its
    bits.
    """
    if not exponents.is_cpu:
        return exponents.exp()
    binary = (exponents * 1.4426950408889634).clamp_min(-126)
    if not torch.compiler.is_compiling() or exponents.dtype != torch.float32:
        return binary.exp2()
    k = binary.round()
    f = binary - k
    square = f * f
    upper = 0.05550742616 * f + 0.24022121754 + square * (0.00132669704 * f + 0.00967545975)
    return (0.69314694916 * f + 1.00000007103 + square * upper) * ((k.int() + 127) << 23).view(torch.float32)


def _exponential_sums(piece: Tensor, rate: Tensor, bound: Tensor, once: bool) -> Tensor:
    high, low, e_high, e_low = _exponentials(piece, rate, bound, once)
    sums = []
    for distance, e in ((high, e_high), (low, e_low)):
        first = e * distance
        sums += [e.sum(dim=1), first.sum(dim=1), (first * distance).sum(dim=1)]
    return torch.stack(sums, dim=1)


def _add_gradient(grad: Tensor, piece: Tensor, rate: Tensor, bound: Tensor, coefficients: Tensor, once: bool) -> None:
    high, low, e_high, e_low = _exponentials(piece, rate, bound, once)
    c = coefficients
    grad.add_(e_high * (c[:, :1] - c[:, 1:2] * high) - e_low * (c[:, 2:3] - c[:, 3:] * low))


def _walk(compiled: bool, *blocks: Tensor) -> Iterable[tuple[slice, tuple[Tensor, ...]]]:
    """Piece by piece, so that temporaries stay small; a fused pass has none and takes the whole."""
    return [(slice(None), blocks)] if compiled else pieces(*blocks)
