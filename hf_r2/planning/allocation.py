"""Which choice each weight gets under a budget of bytes: a multiple-choice knapsack.

Minimize Σᵢ lossᵢ(cᵢ) over one choice cᵢ for every weight, with Σᵢ bytesᵢ(cᵢ) ≤ budget. For any price λ ≥ 0 of a byte,

    L(λ) = Σᵢ minⱼ (lossᵢⱼ + λ bytesᵢⱼ) − λ budget

is a lower bound (Lagrangian relaxation; for bit allocation Shoham and Gersho, 1988), the best of them the value of the
linear relaxation. With the excess of a choice, eᵢⱼ = lossᵢⱼ + λ bytesᵢⱼ − minⱼ (…) ≥ 0, every solution costs

    Σᵢ lossᵢ = L(λ) + Σᵢ eᵢ + λ (budget − Σᵢ bytesᵢ)

so that a partial solution whose excess alone exceeds what the best known solution has above L(λ) leads nowhere.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

STATES = 1 << 15
"""Partial solutions that are kept at a time. Memory is 6 bytes for each of them and weight."""


@dataclass(frozen=True)
class Allocation:
    """A choice for every weight.

    Args:
        choices: index of the choice, by weight.
        nbytes: bytes of all choices.
        loss: sum of their losses.
        bound: no solution under the same budget has a smaller loss.
    """

    choices: tuple[int, ...]
    nbytes: int
    loss: float
    bound: float

    @property
    def gap(self) -> float:
        """How much larger the loss may be than the best possible one, as a share of it; 0 is optimal."""
        above = self.loss - self.bound
        return above / abs(self.loss) if above > 0 else 0.0


def allocate(
    nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int, states: int = STATES
) -> Allocation:
    """Find the choices of least total loss whose bytes fit a budget.

    Dynamic programming over the Pareto-optimal partial solutions (bytes, loss), without those that the Lagrangian bound
    rules out. It is exact unless more than `states` of them are left at a time; those of the largest excess are then
    dropped, and the bound says what they might have come to.

    Args:
        nbytes: bytes of every choice, by weight; weights may differ in their number of choices.
        losses: their losses, in any unit that adds up; they may be negative.
        budget: bytes of all choices together, at most.
        states: see above.

    Raises:
        ValueError: if not even the smallest choices fit the budget.
    """
    smallest = [min(sizes) for sizes in nbytes]
    if sum(smallest) > budget:
        raise ValueError(f"the smallest choices take {sum(smallest)} bytes, the budget is {budget}")
    incumbent, price = _greedy(nbytes, losses, budget)
    priced = [
        np.asarray(loss, dtype=np.float64) + price * np.asarray(sizes, dtype=np.float64)
        for sizes, loss in zip(nbytes, losses, strict=True)
    ]
    relaxed = math.fsum(values.min() for values in priced) - price * budget
    # Sums in another order differ by rounding, which must not cut the optimum off
    tolerance = 1e-12 * (abs(relaxed) + math.fsum(np.abs(values).max() for values in priced))
    limit = _total(losses, incumbent) - relaxed + tolerance

    order = sorted(range(len(nbytes)), key=lambda weight: smallest[weight] - max(nbytes[weight]))
    after = sum(smallest)
    size, excess = np.zeros(1, dtype=np.int64), np.zeros(1)
    history: list[tuple[np.ndarray, np.ndarray]] = []
    dropped = math.inf
    for weight in order:
        after -= smallest[weight]
        own = priced[weight] - priced[weight].min()
        size = (size[:, None] + np.asarray(nbytes[weight], dtype=np.int64)).ravel()
        excess = (excess[:, None] + own).ravel()
        kept = np.flatnonzero((excess <= limit) & (size + after <= budget))
        kept = kept[_pareto(size[kept], excess[kept] - price * size[kept])]
        if len(kept) > states:
            kept = kept[np.argsort(excess[kept], kind="stable")]
            dropped = min(dropped, float(excess[kept[states]]))
            kept = kept[:states]
        history.append(((kept // len(own)).astype(np.int32), (kept % len(own)).astype(np.int16)))
        size, excess = size[kept], excess[kept]
    choices = _least(_traced(history, order, size, excess - price * size), incumbent, losses)
    loss = _total(losses, choices)
    # Whatever was not dropped has been searched
    bound = min(loss, relaxed + dropped)
    return Allocation(choices, _bytes(nbytes, choices), loss, bound)


def supported_front(nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[Allocation]:
    """List the solutions that are optimal for some price of a byte, from the smallest on.

    They are the corners of the convex hull of all solutions: each is optimal among those of its bytes or fewer.

    Args:
        nbytes: see [`allocate`].
        losses: see there.
    """
    choices = _start(nbytes, losses)
    points = [choices]
    for step in _steps(nbytes, losses):
        choices = (*choices[: step.weight], step.choice, *choices[step.weight + 1 :])
        points.append(choices)
    totals = [(point, _bytes(nbytes, point), _total(losses, point)) for point in points]
    return [Allocation(point, size, loss, loss) for point, size, loss in totals]


class _Step(NamedTuple):
    """From one corner of a weight's convex hull to the next larger one: loss saved for a byte, and the choice."""

    price: float
    weight: int
    choice: int
    nbytes: int


def _start(nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> tuple[int, ...]:
    """Take the smallest choice of every weight; of several the one of least loss."""
    return tuple(min(range(len(n)), key=lambda j, n=n, d=d: (n[j], d[j])) for n, d in zip(nbytes, losses, strict=True))


def _steps(nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]]) -> list[_Step]:
    """List the steps of all weights, those that save most for a byte first; the steps of a weight are in order."""
    steps = []
    for weight, (first, sizes, loss) in enumerate(zip(_start(nbytes, losses), nbytes, losses, strict=True)):
        current = first
        while True:
            larger = [j for j in range(len(sizes)) if sizes[j] > sizes[current] and loss[j] < loss[current]]
            if not larger:
                break
            prices = {j: (loss[current] - loss[j]) / (sizes[j] - sizes[current]) for j in larger}
            chosen = max(larger, key=lambda j, prices=prices, sizes=sizes: (prices[j], sizes[j]))
            steps.append(_Step(prices[chosen], weight, chosen, sizes[chosen] - sizes[current]))
            current = chosen
    return sorted(steps, key=lambda step: -step.price)


def _greedy(
    nbytes: Sequence[Sequence[int]], losses: Sequence[Sequence[float]], budget: int
) -> tuple[tuple[int, ...], float]:
    """Take steps while they fit; and the price of the first that does not, which makes the bound best; 0 if all fit."""
    choices = list(_start(nbytes, losses))
    left = budget - _bytes(nbytes, choices)
    price, stopped = 0.0, set()
    for step in _steps(nbytes, losses):
        if step.weight in stopped:
            continue
        if step.nbytes > left:
            price = price or step.price
            stopped.add(step.weight)
        else:
            choices[step.weight] = step.choice
            left -= step.nbytes
    return tuple(choices), price


def _pareto(size: np.ndarray, loss: np.ndarray) -> np.ndarray:
    """Return the indices of entries that no other beats in both; of equal ones the first, ordered by size."""
    order = np.lexsort((loss, size))
    sorted_loss = loss[order]
    best_before = np.concatenate(([np.inf], np.minimum.accumulate(sorted_loss)[:-1]))
    return order[sorted_loss < best_before]


def _traced(
    history: Sequence[tuple[np.ndarray, np.ndarray]], order: Sequence[int], size: np.ndarray, loss: np.ndarray
) -> tuple[int, ...] | None:
    """Follow the best final state back to its choices; None if the bound left nothing."""
    if not len(size):
        return None
    state = int(np.lexsort((size, loss))[0])
    choices = [0] * len(order)
    for weight, (parents, chosen) in zip(reversed(order), reversed(history), strict=True):
        choices[weight] = int(chosen[state])
        state = int(parents[state])
    return tuple(choices)


def _least(
    found: tuple[int, ...] | None, incumbent: tuple[int, ...], losses: Sequence[Sequence[float]]
) -> tuple[int, ...]:
    return found if found is not None and _total(losses, found) <= _total(losses, incumbent) else incumbent


def _total(losses: Sequence[Sequence[float]], choices: Sequence[int]) -> float:
    return math.fsum(losses[weight][choice] for weight, choice in enumerate(choices))


def _bytes(nbytes: Sequence[Sequence[int]], choices: Sequence[int]) -> int:
    return sum(nbytes[weight][choice] for weight, choice in enumerate(choices))
