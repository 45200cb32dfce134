from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import kmeans_vectors as module
from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.codecs.kmeans_vectors import kmeans_vectors, nearest_vector

LEVELS = st.sampled_from([-2.0, -0.5, 0.0, 0.0, 0.25, 1.0, 3.0])


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def nearest_by_hand(vectors, table):
    """Point by point, entry by entry: the first of the entries at the least distance."""
    codes = []
    for point in vectors.double().tolist():
        distances = [sum((x - c) ** 2 for x, c in zip(point, entry, strict=True)) for entry in table.double().tolist()]
        codes.append(distances.index(min(distances)))
    return codes


def squared_error(vectors, table):
    points, entries = vectors.double().numpy(), table.double().numpy()
    return float(np.square(points[:, None] - entries).sum(axis=2).min(axis=1).sum())


def best_partition(points, k):
    """Squared error of the best of all ways to hand out the points to k clusters."""
    errors = []
    for labels in product(range(k), repeat=len(points)):
        clusters = [points[np.array(labels) == label] for label in set(labels)]
        errors.append(sum(np.square(cluster - cluster.mean(axis=0)).sum() for cluster in clusters))
    return min(errors)


def lloyd_by_hand(points, table, passes):
    """Plain Lloyd; an empty cluster stays where it is."""
    points, table = points.double().numpy(), table.double().numpy()
    for _ in range(passes):
        codes = np.square(points[:, None] - table).sum(axis=2).argmin(axis=1)
        table = np.stack(
            [points[codes == code].mean(axis=0) if (codes == code).any() else table[code] for code in range(len(table))]
        )
    return float(np.square(points[:, None] - table).sum(axis=2).min(axis=1).sum())


@settings(deadline=None, max_examples=100)
@given(st.data(), st.integers(1, 3), st.integers(1, 6), st.integers(1, 5), st.integers(1, 9))
def test_a_code_names_the_first_of_the_nearest_entries(data, groups, m, d, k):
    numbers = data.draw(st.lists(LEVELS, min_size=groups * (m + k) * d, max_size=groups * (m + k) * d))
    vectors = torch.tensor(numbers[: groups * m * d]).view(groups, m, d)
    table = torch.tensor(numbers[groups * m * d :]).view(groups, k, d)
    codes = nearest_vector(vectors, table)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [nearest_by_hand(*group) for group in zip(vectors, table, strict=True)]


@pytest.mark.parametrize(("d", "k"), [(1, 2), (2, 16), (3, 256), (64, 5)])
def test_near_ties_are_told_apart_as_in_float64(d, k):
    table = 1000 + 1e-3 * normal(2, k, d)
    table[:, k // 2] = table[:, 0]
    vectors = (table.repeat(1, 3, 1) + 1000) / 2 + 1e-4 * normal(2, 3 * k, d, seed=1)
    expected = [nearest_by_hand(*group) for group in zip(vectors, table, strict=True)]
    assert nearest_vector(vectors, table).tolist() == expected


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_distances_neither_underflow_nor_overflow(scale):
    vectors, table = normal(1, 50, 3), normal(1, 8, 3, seed=1)
    assert nearest_vector(vectors * scale, table * scale).tolist() == nearest_vector(vectors, table).tolist()


@pytest.mark.parametrize("pairs", [1, 7, 40, 300])
def test_codes_do_not_depend_on_the_pieces(monkeypatch, pairs):
    vectors, table = normal(5, 23, 2), normal(5, 4, 2, seed=1)
    expected = nearest_vector(vectors, table)
    monkeypatch.setattr(module, "_CPU_PAIRS", pairs)
    assert torch.equal(nearest_vector(vectors, table), expected)


def test_no_tensor_of_points_times_entries_is_built(monkeypatch):
    sizes = []
    minimum = torch.Tensor.min
    monkeypatch.setattr(torch.Tensor, "min", lambda self, dim: sizes.append(self.numel()) or minimum(self, dim=dim))
    kmeans_vectors(normal(3, 5000, 2), 64)
    nearest_vector(normal(1, 20_000, 2), normal(1, 256, 2, seed=1))
    assert max(sizes) <= 1 << 18
    assert len(sizes) > 10


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(LEVELS, LEVELS), min_size=1, max_size=6), st.integers(1, 3))
def test_a_table_is_a_local_optimum_near_the_best_partition(points, k):
    vectors = torch.tensor(points)[None]
    error = squared_error(vectors[0], kmeans_vectors(vectors, k)[0])
    best = best_partition(np.array(points), k)
    # k-means++ is within 8 (ln k + 2) of the optimum in expectation; Lloyd then improves it
    assert best * (1 - 1e-6) - 1e-9 <= error <= 8 * (np.log(k) + 2) * best + 1e-9


@pytest.mark.parametrize(("m", "d", "k"), [(300, 2, 4), (1000, 2, 16), (1000, 4, 64), (200, 8, 100), (50, 3, 32)])
@pytest.mark.parametrize("seed", [0, 1])
def test_never_worse_than_its_start_nor_than_plain_lloyd_from_it(m, d, k, seed):
    vectors = normal(1, m, d, seed=seed) ** 3
    start = module._start(vectors, k)
    error = squared_error(vectors[0], kmeans_vectors(vectors, k)[0])
    assert error <= squared_error(vectors[0], start[0]) * (1 + 1e-6)
    assert error <= lloyd_by_hand(vectors[0], start[0], 100) * (1 + 1e-6)


@pytest.mark.parametrize("passes", range(1, 6))
def test_no_pass_makes_it_worse_even_where_clusters_are_empty(passes):
    vectors = normal(1, 200, 2)
    start = vectors[:, :1].repeat(1, 16, 1).double()
    errors = [squared_error(vectors[0], module._lloyd(vectors, start, count)[0]) for count in (passes, passes + 1)]
    assert errors[1] <= errors[0] <= squared_error(vectors[0], start[0])
    assert len(module._lloyd(vectors, start, 20)[0].unique(dim=0)) == 16


@pytest.mark.parametrize("n", [200, 3000])
@pytest.mark.parametrize("k", [2, 8])
def test_vectors_of_one_value_are_clustered_nearly_as_well_as_the_optimum(n, k):
    values = normal(1, n)
    optimum = squared_error(values[0, :, None], kmeans_1d(values, k)[0, :, None])
    assert squared_error(values[0, :, None], kmeans_vectors(values[..., None], k)[0]) <= 1.2 * optimum


def test_far_apart_clouds_are_found():
    centres = torch.tensor([[0.0, 0, 0], [9, 0, 0], [0, 9, 0], [0, 0, 9], [9, 9, 9]])
    vectors = centres[torch.arange(1000) % 5] + 0.1 * normal(1000, 3)
    expected = torch.stack([vectors[index::5].double().mean(dim=0).float() for index in range(5)])
    order = np.lexsort(expected.flip(1).numpy().T)
    assert torch.allclose(kmeans_vectors(vectors[None], 5)[0], expected[order.copy()], atol=1e-5)


def test_pairs_of_normal_values_are_coded_better_than_each_value_by_its_optimal_table():
    vectors = normal(1, 20_000, 2)
    values = vectors.flatten()[None]
    by_value = squared_error(values[0, :, None], kmeans_1d(values, 4)[0, :, None])
    # 2 bits a value of a normal source: 9.30 dB by values (Max, 1960), at best about 9.69 dB by pairs
    assert squared_error(vectors[0], kmeans_vectors(vectors, 16)[0]) < 10 ** ((9.30 - 9.60) / 10) * by_value


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(LEVELS, LEVELS, LEVELS), min_size=1, max_size=12), st.integers(0, 5), st.integers(0, 99))
def test_enough_clusters_for_every_distinct_vector_leave_no_error(points, spare, seed):
    distinct = sorted(set(points))
    vectors = np.repeat(points, np.random.default_rng(seed).integers(1, 5, len(points)), axis=0)
    table = kmeans_vectors(torch.tensor(vectors, dtype=torch.float32)[None], len(distinct) + spare)[0]
    assert {tuple(entry) for entry in table.tolist()} == set(distinct)


@pytest.mark.parametrize(("kinds", "k"), [(16, 16), (40, 64), (256, 256)])
def test_distinct_vectors_that_the_sample_misses_are_found(monkeypatch, kinds, k):
    monkeypatch.setattr(module, "SAMPLE", 30)
    distinct = normal(kinds, 2) ** 3
    vectors = torch.cat([distinct[torch.randint(kinds // 4, (3000,))], distinct])[None]
    table = kmeans_vectors(vectors, k)[0]
    assert {tuple(entry) for entry in table.tolist()} == {tuple(entry) for entry in distinct.tolist()}


@pytest.mark.parametrize("m", [1, 7, 4000])
@pytest.mark.parametrize("k", [1, 2, 256])
def test_a_constant_group_is_reproduced(m, k):
    for value in (0.0, 0.1, -3e-8, 7e5):
        table = kmeans_vectors(torch.full((1, m, 3), value), k)
        assert torch.equal(table, torch.full((1, k, 3), value))


def test_one_cluster_is_the_mean():
    vectors = normal(1, 5000, 3) ** 3 + 100
    assert torch.equal(kmeans_vectors(vectors, 1)[:, 0], vectors.double().mean(dim=1).float())


@pytest.mark.parametrize("d", [1, 2, 5, 64])
def test_tables_are_float32_in_lexicographic_order(d):
    table = kmeans_vectors(torch.randint(-1, 2, (3, 60, d), generator=torch.Generator().manual_seed(0)).float(), 9)
    assert table.dtype == torch.float32
    assert table.shape == (3, 9, d)
    for entries in table.tolist():
        assert entries == sorted(entries)


def groups_of_every_kind():
    return torch.stack([normal(41, 2), normal(41, 2, seed=1) ** 3, torch.zeros(41, 2), normal(41, 2).round()])


@pytest.mark.parametrize("k", [1, 2, 7, 64])
@pytest.mark.parametrize("sample", [20, 1000])
def test_groups_are_solved_independently_of_each_other(monkeypatch, k, sample):
    monkeypatch.setattr(module, "SAMPLE", sample)
    vectors = groups_of_every_kind()
    alone = torch.cat([kmeans_vectors(group[None], k) for group in vectors])
    assert torch.equal(kmeans_vectors(vectors, k), alone)
    monkeypatch.setattr(module, "_BAND_POINTS", 2 * 41)
    monkeypatch.setattr(module, "_CPU_PAIRS", 50)
    assert torch.equal(kmeans_vectors(vectors, k), alone)


def test_the_same_vectors_give_the_same_table_whatever_the_random_state_and_the_threads(monkeypatch):
    monkeypatch.setattr(module, "SAMPLE", 2000)
    vectors = normal(1, 9000, 2)
    threads = torch.get_num_threads()
    torch.manual_seed(1)
    state = torch.get_rng_state()
    table = kmeans_vectors(vectors, 5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    torch.set_num_threads(3 - min(threads, 2))
    try:
        assert torch.equal(kmeans_vectors(vectors, 5), table)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_any_float_dtype_is_solved_like_the_same_numbers_in_float32(dtype):
    vectors = normal(2, 100, 3).to(dtype)
    assert torch.equal(kmeans_vectors(vectors, 8), kmeans_vectors(vectors.float(), 8))


def test_memory_layout_does_not_matter_and_the_gradient_is_not_followed():
    vectors = normal(2, 60, 3)
    table = kmeans_vectors(vectors, 4)
    strided = vectors.permute(2, 1, 0).contiguous().permute(2, 1, 0).requires_grad_()
    assert torch.equal(kmeans_vectors(strided, 4), table)
    assert not kmeans_vectors(strided, 4).requires_grad
    assert torch.equal(nearest_vector(strided, table.requires_grad_()), nearest_vector(vectors, table))


def test_a_large_common_offset_loses_nothing():
    vectors = (normal(1, 500, 2) * 2**10).round() / 2**10
    expected, shifted = kmeans_vectors(vectors, 8), kmeans_vectors(vectors + 4096, 8)
    assert torch.allclose(shifted - 4096, expected, atol=2**-11)


def test_tables_scale_with_the_values():
    vectors = normal(1, 300, 2)
    for exponent in (-60, -1, 60):
        assert torch.equal(kmeans_vectors(vectors * 2.0**exponent, 8), kmeans_vectors(vectors, 8) * 2.0**exponent)


def test_passes_are_bounded_by_the_work_of_a_group(monkeypatch):
    counts = []
    lloyd = module._lloyd
    monkeypatch.setattr(module, "_lloyd", lambda *arguments: counts.append(arguments[2]) or lloyd(*arguments))
    kmeans_vectors(normal(1, 100, 2), 4)
    monkeypatch.setattr(module, "_GROUP_WORK", 20 * 100 * 4 * 2)
    kmeans_vectors(normal(1, 100, 2), 4)
    monkeypatch.setattr(module, "_GROUP_WORK", 1)
    kmeans_vectors(normal(1, 100, 2), 4)
    assert counts == [64, 20, 10]
