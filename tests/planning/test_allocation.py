"""The allocation against brute force, its bound, and the front."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.planning.allocation import allocate, supported_front

sizes = st.integers(1, 40)
figures = st.one_of(st.integers(-3, 12).map(float), st.floats(-1e-3, 5, allow_nan=False))
weights = st.lists(st.lists(st.tuples(sizes, figures), min_size=1, max_size=4), min_size=1, max_size=6)


def split(problem):
    return [[n for n, _ in weight] for weight in problem], [[d for _, d in weight] for weight in problem]


def solutions(nbytes, losses):
    """Every solution as (choices, bytes, loss)."""
    for choices in itertools.product(*(range(len(weight)) for weight in nbytes)):
        picked = list(enumerate(choices))
        yield choices, sum(nbytes[i][j] for i, j in picked), math.fsum(losses[i][j] for i, j in picked)


def bit_widths(count, seed):
    """Weights of 1–8 bits whose losses fall by 4 with every bit, as noise does, and differ in sensitivity."""
    generator = np.random.default_rng(seed)
    elements = generator.choice([128 * 128, 128 * 512, 512 * 512], count) + generator.integers(0, 64, count)
    scale = generator.lognormal(0, 2, count)
    nbytes = [[int(n) * bits // 8 + 4 * 2**bits for bits in range(1, 9)] for n in elements]
    losses = [[float(s * 4.0**-bits * generator.lognormal(0, 0.3)) for bits in range(1, 9)] for s in scale]
    return nbytes, losses


@settings(deadline=None, max_examples=300)
@given(weights, st.floats(0, 1))
def test_the_allocation_is_that_of_brute_force(problem, share):
    nbytes, losses = split(problem)
    smallest, largest = (sum(f(weight) for weight in nbytes) for f in (min, max))
    budget = round(smallest + share * (largest - smallest))
    best = min(loss for _, size, loss in solutions(nbytes, losses) if size <= budget)
    found = allocate(nbytes, losses, budget)
    assert found.nbytes <= budget
    assert (found.choices, found.nbytes, found.loss) in solutions(nbytes, losses)
    assert found.loss == pytest.approx(best, abs=1e-9)
    assert found.gap <= 1e-9


@settings(deadline=None, max_examples=100)
@given(weights, st.floats(0, 1), st.integers(1, 3))
def test_with_few_states_the_bound_still_holds(problem, share, states):
    nbytes, losses = split(problem)
    smallest, largest = (sum(f(weight) for weight in nbytes) for f in (min, max))
    budget = round(smallest + share * (largest - smallest))
    best = min(loss for _, size, loss in solutions(nbytes, losses) if size <= budget)
    found = allocate(nbytes, losses, budget, states)
    assert found.nbytes <= budget
    assert found.bound <= best + 1e-9
    assert found.loss >= best - 1e-9


@settings(deadline=None, max_examples=100)
@given(weights)
def test_no_solution_is_better_than_a_point_of_the_front_at_its_bytes(problem):
    nbytes, losses = split(problem)
    everything = list(solutions(nbytes, losses))
    front = supported_front(nbytes, losses)
    for point in front:
        assert point.loss <= min(loss for _, size, loss in everything if size <= point.nbytes) + 1e-9
    assert [point.nbytes for point in front] == sorted({point.nbytes for point in front})
    assert front[0].nbytes == min(size for _, size, _ in everything)
    assert front[-1].loss == pytest.approx(min(loss for _, _, loss in everything), abs=1e-9)


@pytest.mark.parametrize("count", [74, 300])
@pytest.mark.parametrize("share", [0.1, 0.35])
def test_models_of_many_weights_are_solved_to_optimality(count, share):
    nbytes, losses = bit_widths(count, seed=count)
    smallest, largest = (sum(f(weight) for weight in nbytes) for f in (min, max))
    budget = round(smallest + share * (largest - smallest))
    found = allocate(nbytes, losses, budget)
    assert found.gap == 0
    assert budget - min(map(min, nbytes)) < found.nbytes <= budget


def test_dropped_states_cost_optimality_and_the_gap_says_so():
    nbytes, losses = bit_widths(74, seed=1)
    budget = sum(weight[1] for weight in nbytes)
    exact, rough = allocate(nbytes, losses, budget), allocate(nbytes, losses, budget, states=1)
    assert exact.gap == 0 < rough.gap < 0.1
    assert rough.bound <= exact.loss <= rough.loss


def test_a_budget_below_the_smallest_choices_is_refused():
    with pytest.raises(ValueError, match="smallest choices take 7 bytes, the budget is 6"):
        allocate([[3, 5], [4, 9]], [[1, 0], [1, 0]], 6)
