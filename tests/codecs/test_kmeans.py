from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import kmeans
from hf_r2.codecs.kmeans import kmeans_1d

DATA = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "cubed normal": lambda rng, n: rng.standard_normal(n) ** 3,
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "one outlier": lambda rng, n: np.append(rng.standard_normal(n - 1), 100),
    "outliers": lambda rng, n: np.append(rng.standard_normal(n - 20), rng.choice([-100, 100], 20)),
}
TIED_VALUES = st.one_of(
    st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5]), st.floats(-10, 10, width=32), st.integers(-3, 3).map(float)
)


def sample(data, n, seed=0):
    return DATA[data](np.random.default_rng(seed), n).astype(np.float32)


def solve(values, k):
    return kmeans_1d(torch.tensor(np.asarray(values))[None], k)[0].double().numpy()


def squared_error(values, table):
    values = np.asarray(values, dtype=np.float64)
    return float(np.square(values[:, None] - table).min(axis=1).sum())


def spread(values):
    return float(np.square(values - np.mean(values)).sum()) if len(values) else 0.0


def brute_force(values, k):
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    partitions = ((0, *cuts, n) for cuts in combinations(range(1, n), min(k, n) - 1))
    return min(sum(spread(ordered[a:b]) for a, b in pairwise(cuts)) for cuts in partitions)


def quadratic_program(values, k):
    """`least[j]` is the error of the first j values in m clusters; every start of the last one is tried."""
    ordered = np.sort(np.asarray(values, dtype=np.float64))
    n = len(ordered)
    cost = np.zeros((n + 1, n + 1))
    for start in range(n):
        for stop in range(start + 1, n + 1):
            cost[start, stop] = spread(ordered[start:stop])
    least = cost[0]
    for _ in range(1, k):
        least = np.array([(least[: stop + 1] + cost[: stop + 1, stop]).min() for stop in range(n + 1)])
    return least[n]


def lloyd_from_quantiles(values, k, steps=300):
    table = np.quantile(values, (np.arange(k) + 0.5) / k)
    for _ in range(steps):
        nearest = np.searchsorted((table[:-1] + table[1:]) / 2, values)
        sizes = np.bincount(nearest, minlength=k)
        table = np.where(sizes, np.bincount(nearest, values, minlength=k) / np.maximum(sizes, 1), table)
    return table


@settings(deadline=None, max_examples=200)
@given(st.lists(TIED_VALUES, min_size=1, max_size=9), st.integers(1, 4))
def test_the_error_is_that_of_the_best_of_all_partitions(values, k):
    table = solve(values, k)
    assert len(table) == k
    assert squared_error(values, table) == pytest.approx(brute_force(values, k), rel=1e-6, abs=1e-10)


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize(("n", "k"), [(60, 1), (61, 2), (120, 5), (200, 16), (200, 64)])
def test_the_error_is_that_of_the_quadratic_dynamic_program(data, n, k):
    values = sample(data, n, seed=n + k)
    assert squared_error(values, solve(values, k)) == pytest.approx(quadratic_program(values, k), rel=1e-6, abs=1e-9)


def test_one_cluster_is_the_mean():
    values = sample("cubed normal", 5000)
    assert solve(values, 1) == pytest.approx([values.astype(np.float64).mean()], rel=1e-6)


@pytest.mark.parametrize("k", [1, 2, 5, 16])
def test_a_table_is_sorted_float32_of_k_values(k):
    for data in DATA:
        for n in (1, 3, 50, 3000):
            table = kmeans_1d(torch.tensor(sample(data, max(n, 21))[:n])[None], k)
            assert table.dtype == torch.float32
            assert table.shape == (1, k)
            assert (table.diff() >= 0).all()


def rows_of_every_kind(n):
    values = [sample(data, n, seed=row) for row in range(3) for data in DATA]
    return torch.tensor(np.stack([*values, np.zeros(n, np.float32), np.repeat(np.float32(0.7), n)]))


@pytest.mark.parametrize("k", [1, 2, 7, 16])
@pytest.mark.parametrize(("n", "exact_points"), [(50, 2048), (300, 64)])
def test_rows_are_solved_independently_of_each_other(monkeypatch, n, exact_points, k):
    monkeypatch.setattr(kmeans, "EXACT_POINTS", exact_points)
    rows = rows_of_every_kind(n)
    alone = torch.cat([kmeans_1d(row[None], k) for row in rows])
    assert torch.equal(kmeans_1d(rows, k), alone)
    monkeypatch.setattr(kmeans, "_CHUNK_POINTS", 4 * min(n, exact_points))
    assert torch.equal(kmeans_1d(rows, k), alone)


@pytest.mark.parametrize("n", [41, 3001])
def test_order_and_memory_layout_do_not_matter(n):
    rows = torch.tensor(np.stack([sample("cubed normal", n, seed) for seed in range(4)]))
    table = kmeans_1d(rows, 8)
    assert torch.equal(kmeans_1d(rows.flip(1), 8), table)
    assert torch.equal(kmeans_1d(rows.T.contiguous().T, 8), table)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_solved_like_the_same_numbers_in_float32(dtype):
    values = torch.tensor(sample("normal", 100))[None].to(dtype)
    assert torch.equal(kmeans_1d(values, 8), kmeans_1d(values.float(), 8))


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("seed", [0, 1])
def test_long_rows_are_within_a_thousandth_of_the_optimum(monkeypatch, data, k, seed):
    values = sample(data, 6000, seed)
    assert len(values) > kmeans.EXACT_POINTS
    error = squared_error(values, solve(values, k))
    monkeypatch.setattr(kmeans, "EXACT_POINTS", len(values))
    optimum = squared_error(values, solve(values, k))
    assert optimum * (1 - 1e-6) <= error <= optimum * 1.001


@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize("n", [1000, 6000])
def test_never_worse_than_lloyd_from_quantiles(data, k, n):
    values = sample(data, n, seed=2)
    rival = squared_error(values, lloyd_from_quantiles(values.astype(np.float64), k))
    assert squared_error(values, solve(values, k)) <= rival * (1 + 1e-6)


@settings(deadline=None, max_examples=200)
@given(st.lists(st.integers(-640, 640), min_size=1, max_size=12, unique=True), st.integers(0, 4), st.integers(0, 2**31))
def test_enough_clusters_for_every_distinct_value_leave_no_error(distinct, spare, seed):
    repeats = np.random.default_rng(seed).integers(1, 6, len(distinct))
    values = np.repeat(np.array(distinct, dtype=np.float32) / 64, repeats)
    table = solve(values, len(distinct) + spare)
    assert set(table.tolist()) == set(values.tolist())


@pytest.mark.parametrize(("kinds", "k"), [(4, 4), (10, 16), (200, 256)])
def test_enough_clusters_for_every_distinct_value_of_a_long_row_leave_no_error(kinds, k):
    rng = np.random.default_rng(kinds)
    distinct = rng.standard_t(2, kinds).astype(np.float32)
    values = np.append(distinct, rng.choice(distinct, 6000 - kinds))
    assert set(solve(values, k).tolist()) == set(values.tolist())


@settings(deadline=None, max_examples=200)
@given(st.lists(TIED_VALUES, min_size=1, max_size=12, unique=True), st.integers(0, 4))
def test_enough_clusters_leave_no_error_that_float64_can_see(values, spare):
    error = squared_error(values, solve(np.array(values, np.float32), len(values) + spare))
    assert error <= 1e-14 * np.square(values).sum()


@pytest.mark.parametrize("n", [9, 25, 144, 147, 250])
def test_zeros_of_a_sparse_row_stay_exactly_zero(n):
    rng = np.random.default_rng(n)
    values = (rng.standard_normal(n) * (rng.random(n) < 0.3)).astype(np.float32)
    values[:2] = 0
    closest = abs(solve(values, 256)).min()
    assert closest == 0


@pytest.mark.parametrize("n", [147, 3000])
def test_zeros_that_fill_a_cluster_of_their_own_stay_exactly_zero(n):
    rng = np.random.default_rng(n)
    values = (rng.choice([-1, 1], n) * rng.uniform(1, 2, n) * (rng.random(n) < 0.4)).astype(np.float32)
    closest = abs(solve(values, 16)).min()
    assert closest == 0


@pytest.mark.parametrize("n", [5, 4000])
@pytest.mark.parametrize("k", [1, 2, 16, 256])
def test_a_constant_row_is_reproduced(n, k):
    for value in (0.0, 0.1, -3e-8, 7e5):
        assert set(solve(np.full(n, value, np.float32), k).tolist()) == {float(np.float32(value))}


@pytest.mark.parametrize("n", [300, 6000])
@pytest.mark.parametrize("k", [2, 16])
def test_a_large_common_offset_loses_nothing(n, k):
    noise = np.round(sample("normal", n).astype(np.float64) * 2**10) / 2**10
    table = solve(noise + 1e4, k) - 1e4
    rounding = n * (float(np.spacing(np.float32(1e4))) / 2) ** 2
    assert squared_error(noise, table) <= squared_error(noise, solve(noise, k)) + rounding


def test_a_large_common_offset_moves_no_cluster(monkeypatch):
    monkeypatch.setattr(kmeans, "EXACT_POINTS", 1 << 14)
    step = 2.0**-9
    levels = 1e4 + step * np.arange(16)
    pairs = levels.reshape(8, 2).mean(axis=1)
    assert solve(np.repeat(levels, 1 << 10), 8).tolist() == pairs.tolist()


@pytest.mark.parametrize("n", [300, 6000])
def test_tables_scale_with_the_values(n):
    values = torch.tensor(sample("cubed normal", n))[None]
    for exponent in (-60, -1, 60):
        assert torch.equal(kmeans_1d(values * 2.0**exponent, 8), kmeans_1d(values, 8) * 2.0**exponent)


def test_the_gradient_is_not_followed():
    values = torch.randn(2, 20, requires_grad=True)
    assert not kmeans_1d(values, 4).requires_grad
