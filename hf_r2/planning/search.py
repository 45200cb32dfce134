"""Finds the settings of all weights, and measures on the way if there is calibration data."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tqdm.auto import tqdm

from hf_r2.planning.allocation import Allocation, supported_front
from hf_r2.planning.calibration import CalibratedModel, Measured
from hf_r2.planning.choices import Choices, Settings, Target
from hf_r2.planning.losses import Losses

ROUNDS = 4
_DRAWN, _MEASURED = 64, 8


@dataclass(frozen=True)
class Point:
    """One way to compress all weights.

    Args:
        settings: of every weight, by name.
        file_bytes: bytes of the weight files.
        predicted: sum of the losses of its choices, in the unit of the sensitivity.
        measured: what it loses on the calibration data; None if that was not measured.
    """

    settings: Settings
    file_bytes: int
    predicted: float
    measured: Measured | None = None


class Search:
    """A search among choices with losses that are taken to add up.

    Attributes:
        uniform: the points of the same method and bits for all weights.

    Args:
        choices: what there is to choose from.
        losses: of every choice, by sensitivity; the first is what points are predicted by.
        model: measures points; without it only their predicted loss counts.
    """

    def __init__(self, choices: Choices, losses: Mapping[str, Losses], model: CalibratedModel | None) -> None:
        self._choices, self._model = choices, model
        self._losses, *self._others = losses.values()
        self._front = supported_front(choices.nbytes, self._losses)
        self.uniform = [
            self._point(settings)
            for settings in tqdm(choices.uniform(), desc="Uniform settings", disable=model is None)
        ]

    def allocate(self, target: Target) -> tuple[Point, float]:
        """Find the point of least predicted loss within a target, and its optimality gap."""
        found = _allocate(target, self._losses)
        return self._point(self._choices.settings(found.choices)), found.gap

    def best_uniform(self, target: Target) -> Point | None:
        """Return the uniform point within a target of least measured, or else predicted, loss; None if none is."""
        fitting = [point for point in self.uniform if target.size(self._choices.index(point.settings)) <= target.nbytes]
        return min(fitting, key=lambda point: point.measured.kl if point.measured else point.predicted, default=None)

    def improve(self, point: Point, target: Target) -> Point:
        """Lower the measured KL divergence of a point, and hold what was found against uniform settings.

        The search begins with what measures best: the point, allocations by the other sensitivities, uniform settings.
        A round measures what changes when one weight takes the next smaller or the next larger choice while all others
        stay as they are at the point, and allocates anew with these changes for losses. The search ends when the result
        does not measure better, or after `ROUNDS`.

        Of all points on the way, the plan is the one of least divergence among the uniform settings and those that are
        surely better than these, see [`Measured`]: with labels, of lower cross-entropy. Near the float model a smaller
        divergence from it says little about that, and a few examples can be lucky for one of two points.
        """
        found = [point]
        found += [self._point(self._choices.settings(_allocate(target, losses).choices)) for losses in self._others]
        uniform = self.best_uniform(target)
        if uniform is not None:
            found.append(uniform)
        best = min(found, key=_kl)
        for _ in range(ROUNDS):
            moved = self._point(self._choices.settings(target.allocate(self._changes(best, target)).choices))
            if moved.measured.kl >= best.measured.kl:
                break
            found.append(moved)
            best = moved
        if uniform is None:
            return best
        better = [point for point in found if point.measured.surely_better(uniform.measured)]
        return min([uniform, *better], key=_kl)

    def reach(self, recovery: float) -> tuple[Point, Point | None]:
        """Find the smallest point that was measured to reach a recovery, and the smallest uniform one.

        Points of the front are searched by bisection, as if recovery grew with size. The point may be the uniform one.

        Raises:
            ValueError: if none does, with the best that was measured.
        """
        low, high = -1, len(self._front) - 1
        reached = self._on_front(high, measure=True)
        best = max((reached, *self.uniform), key=lambda point: point.measured.recovery)
        if best.measured.recovery < recovery:
            raise ValueError(
                f"a recovery of {recovery:g} cannot be reached with these weights, method and grain: the best measured "
                f"is {best.measured.recovery:.4f}, at {best.file_bytes:,} bytes"
            )
        while high - low > 1:
            middle = (low + high) // 2
            point = self._on_front(middle, measure=True)
            low, high = (low, middle) if point.measured.recovery >= recovery else (middle, high)
            reached = point if high == middle else reached
        found = [point for point in (reached, *self.uniform) if point.measured.recovery >= recovery]
        found.sort(key=lambda point: (point.file_bytes, point.measured.kl))
        return found[0], next((point for point in found if point is not reached), None)

    def front(self) -> list[Point]:
        """Return points of the Pareto front for a picture, from the smallest on; some of them are measured."""
        measured = self._spread(_MEASURED) if self._model else set()
        shown = sorted(self._spread(_DRAWN) | measured)
        bar = tqdm(shown, desc="Pareto front", disable=self._model is None)
        return [self._on_front(index, measure=index in measured) for index in bar]

    def _spread(self, count: int) -> set[int]:
        last = len(self._front) - 1
        return {round(step * last / (count - 1)) for step in range(count)}

    def _on_front(self, index: int, measure: bool) -> Point:
        return self._point(self._choices.settings(self._front[index].choices), measure)

    def _point(self, settings: Settings, measure: bool = True) -> Point:
        measured = None
        if measure and self._model is not None:
            self._model.compress(settings)
            measured = self._model.measure()
        chosen = zip(self._losses, self._choices.index(settings), strict=True)
        predicted = math.fsum(losses[choice] for losses, choice in chosen)
        return Point(settings, self._choices.checkpoint.file_bytes(settings), predicted, measured)

    def _changes(self, point: Point, target: Target) -> list[dict[int, float]]:
        """Measure by how much the KL divergence changes with a step of one weight, up or down, where that may fit."""
        choices, model = self._choices, self._model
        model.compress(point.settings)
        present = choices.index(point.settings)
        changes = [{choice: 0.0} for choice in present]
        steps = list(map(_neighbours, choices.nbytes, self._losses, present))
        # What all weights free together, if each of them steps down
        freed = sum(
            sizes[choice] - min(sizes[step] for step in [choice, *own])
            for sizes, choice, own in zip(choices.nbytes, present, steps, strict=True)
        )
        room = target.nbytes - target.size(present) + freed
        for index, name in enumerate(tqdm(choices.names, desc="Measuring around the plan", unit="weight")):
            weight = choices.checkpoint.weights[name].read()
            sizes = choices.nbytes[index]
            for choice in (step for step in steps[index] if sizes[step] - sizes[present[index]] <= room):
                with model.changed(name, choices.options[index][choice], weight):
                    changes[index][choice] = model.measure().kl - point.measured.kl
        return changes


def _kl(point: Point) -> float:
    return point.measured.kl


def _allocate(target: Target, losses: Losses) -> Allocation:
    return target.allocate([dict(enumerate(own)) for own in losses])


def _neighbours(nbytes: Sequence[int], losses: Sequence[float], current: int) -> list[int]:
    """Return the next smaller and the next larger choice, of those that no smaller one beats in loss."""
    useful, least = [], math.inf
    for choice in sorted(range(len(nbytes)), key=lambda j: (nbytes[j], losses[j])):
        if losses[choice] < least:
            useful.append(choice)
            least = losses[choice]
    smaller = [choice for choice in useful if nbytes[choice] < nbytes[current]]
    larger = [choice for choice in useful if nbytes[choice] > nbytes[current]]
    return smaller[-1:] + larger[:1]
