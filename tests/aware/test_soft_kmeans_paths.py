"""Which path soft k-means takes, what it holds in memory, and what must not depend on the path."""

from functools import partial

import pytest
import torch
from benchmarks.measuring import extra_bytes

from hf_r2.aware import soft_kmeans as module
from hf_r2.aware import soft_kmeans_exact
from hf_r2.aware.soft_kmeans import soft_kmeans
from hf_r2.aware.soft_kmeans_cubics import CubicTable
from hf_r2.aware.soft_kmeans_lines import LineTable

W = 1 << 20


def normal(*shape, sigma=0.03, seed=0):
    return sigma * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def spread_out(groups, k, sigma=0.03):
    return torch.linspace(-1.5, 1.5, k).mul(sigma).expand(groups, k)


def step(block, start, temperature=1e-4, **options):
    """Soft weights and the gradient of half their squares."""
    leaf = block.detach().requires_grad_()
    options = {"absolute": True, "tolerance": 0.0} | options
    weights = soft_kmeans(leaf, start, temperature, **options).weights
    weights.backward(weights.detach())
    return weights.detach(), leaf.grad


@pytest.fixture
def path(monkeypatch):
    """Tell which path was taken last."""
    taken = []
    for name in ("DistinctSoftKMeans", "TableSoftKMeans", "ExactSoftKMeans"):
        apply = getattr(module, name).apply
        spy = type(name, (), {"apply": lambda *args, name=name, apply=apply: taken.append(name) or apply(*args)})
        monkeypatch.setattr(module, name, spy)
    return lambda: taken[-1].removesuffix("SoftKMeans")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (normal(1, 1 << 17), "Table"),
        (normal(3, 1 << 15), "Table"),
        (normal(1, 1 << 17).double(), "Exact"),
        (normal(1, 1 << 17).bfloat16(), "Distinct"),
        (normal(1, 1 << 17).half(), "Distinct"),
        (normal(2, 1 << 16).half(), "Table"),
        (normal(64, 1 << 10), "Exact"),
        (normal(1, 1 << 17) + 1, "Exact"),
        (torch.zeros(1, 1 << 17), "Exact"),
        (torch.full((1, 1 << 17), 1e-42), "Exact"),
    ],
    ids=["long", "groups", "float64", "bf16", "fp16", "fp16 groups", "rows", "offset", "zeros", "denormal"],
)
def test_tables_serve_long_rows_of_scalars_around_zero(path, block, expected):
    soft_kmeans(block, spread_out(len(block), 4), 1e-4, absolute=True)
    assert path() == expected


def test_vectors_have_no_tables(path):
    soft_kmeans(normal(1, 1 << 17), normal(1, 4, 2), 1e-4, absolute=True)
    assert path() == "Exact"


@pytest.mark.parametrize(("sigma", "temperature", "outlier"), [(0.03, 1e-5, 100), (1.0, 1e-3, 1), (0.03, 1e-7, 1)])
def test_where_attention_is_too_sharp_for_tables_all_elements_are_passed_over(path, sigma, temperature, outlier):
    block = normal(1, 1 << 17, sigma=sigma)
    block[0, 0] = outlier * sigma
    step(block, spread_out(1, 2, sigma), temperature)
    assert path() == "Exact"


def test_centroids_that_drift_apart_get_finer_bins_than_their_start_asked_for():
    block = normal(1, 1 << 17)
    start = torch.tensor([[0.0, 1e-3]])
    found, expected = step(block, start, iterations=8), step(block.double(), start, iterations=8)
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() <= 2e-5 * other.norm()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("block", "temperature"),
    [
        (normal(1, 1 << 17), 1e-4),
        (normal(1, 1 << 17), 2e-5),
        (normal(5, 1 << 15), 1e-4),
        (normal(2, 1 << 16).half(), 1e-4),
        (normal(1, 1 << 15).bfloat16(), 1e-4),
    ],
    ids=["one group", "more than 32,768 bins", "groups", "fp16", "bf16"],
)
def test_fused_passes_change_nothing(path, block, temperature):
    start = spread_out(len(block), 4)
    fused, eager = (step(block, start, temperature, compiled=compiled) for compiled in (True, False))
    assert path() == "Table"
    for one, other in zip(fused, eager, strict=True):
        assert (one.double() - other.double()).norm() <= max(1e-5, torch.finfo(block.dtype).eps) * other.double().norm()


@pytest.fixture
def kind(monkeypatch):
    """Tell which table was made last."""
    made = []
    monkeypatch.setattr(module, "tabulate", lambda *args, make=module.tabulate: made.append(make(*args)) or made[-1])
    return lambda: type(made[-1])


@pytest.mark.parametrize(
    ("n", "k", "expected"),
    [
        (1 << 17, 2, LineTable),
        (1 << 15, 4, LineTable),
        (1 << 13, 4, CubicTable),
        (1 << 12, 16, CubicTable),
        (1 << 13, 2, type(None)),
        (1 << 9, 16, type(None)),
    ],
)
def test_a_table_is_made_where_it_costs_less_than_attention(kind, n, k, expected):
    step(normal(3, n), spread_out(3, k))
    assert kind() is expected


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("equal", [0, 1 << 7, 1 << 11])
@pytest.mark.parametrize("k", [4, 16])
def test_cubics_agree_with_float64(kind, compiled, dtype, equal, k):
    block = normal(5, 1 << (13 if k == 4 else 12))
    block[:, :equal] = 0.01003
    block, start = block.to(dtype), spread_out(5, k)
    found = step(block, start, compiled=compiled)
    assert kind() is CubicTable
    expected = step(block.double(), start)
    least = torch.finfo(dtype).eps if dtype == torch.bfloat16 else 0.0
    assert (found[0] - expected[0]).norm() <= max(1e-5, least) * expected[0].norm()
    assert (found[1] - expected[1]).norm() <= max(1e-4, least) * expected[1].norm()


def test_cubics_hold_less_than_four_times_the_weight(kind):
    block, start = normal(256, W // 256), spread_out(256, 16)
    step(block, start)
    assert extra_bytes(lambda: step(block, start), cuda=False) <= 4 * 4 * W
    assert kind() is CubicTable


@pytest.mark.parametrize("k", [2, 16])
@pytest.mark.parametrize("iterations", [3, 20])
def test_tables_hold_three_and_a_half_times_the_weight(path, k, iterations):
    block, start = normal(1, W), spread_out(1, k)
    step(block, start)
    # Soft weights, their gradient and the index are 3 W of it
    assert extra_bytes(lambda: step(block, start, iterations=iterations), cuda=False) <= 3.5 * 4 * W
    assert path() == "Table"


@pytest.mark.parametrize("k", [4, 16])
def test_tables_of_many_groups_hold_up_to_one_weight_more(path, k):
    block, start = normal(32, W // 32), spread_out(32, k)
    step(block, start)
    assert extra_bytes(lambda: step(block, start), cuda=False) <= 4.5 * 4 * W
    assert path() == "Table"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_distinct_values_hold_little_more_than_the_weight_and_its_gradient(dtype):
    block, start = normal(1, 4 * W).to(dtype), spread_out(1, 16)
    assert extra_bytes(lambda: step(block, start), cuda=False) <= 3.5 * 2 * 4 * W


@pytest.mark.parametrize(("k", "iterations"), [(4, 3), (16, 6)])
@pytest.mark.parametrize("shape", [(1, W), (64, W // 64), (1024, W // 1024)])
def test_passes_over_all_elements_hold_three_and_a_half_times_the_weight(path, shape, k, iterations):
    block, start = normal(*shape) + 1, spread_out(shape[0], k) + 1
    assert extra_bytes(lambda: step(block, start, iterations=iterations), cuda=False) <= 3.5 * 4 * W
    assert path() == "Exact"


@pytest.mark.slow
@pytest.mark.parametrize("offset", [0, 1])
def test_sixteen_million_weights_and_sixteen_clusters_hold_three_and_a_half_times_the_weight(offset):
    block, start = normal(1, 16 * W) + offset, spread_out(1, 16) + offset
    assert extra_bytes(lambda: step(block, start), cuda=False) <= 3.5 * 4 * 16 * W


@pytest.mark.parametrize("start", [spread_out(1, 256) + 1, normal(1, 256, 2)])
def test_temporaries_keep_within_the_memory_they_may_take(monkeypatch, start):
    monkeypatch.setattr(soft_kmeans_exact, "_LEAST", 1 << 30)
    block = normal(1, 1 << 15) + (1 if start.dim() == 2 else 0)
    held = [extra_bytes(partial(step, block, start, memory=most), cuda=False) for most in (1 << 20, 1 << 24)]
    owned = 4 * 4 * block.numel()
    assert held[0] <= (1 << 20) + owned
    assert held[1] <= (1 << 24) + owned
    assert held[1] > held[0]


@pytest.mark.parametrize("start", [spread_out(3, 5) + 1, normal(3, 5, 3)])
@pytest.mark.parametrize("memory", [1, 5000, 100_000])
def test_results_do_not_depend_on_the_memory(start, memory):
    block = normal(3, 1000).double() + (1 if start.dim() == 2 else 0)
    for one, other in zip(step(block, start, memory=memory), step(block, start), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", [200, 1 << 14])
def test_groups_stop_and_end_up_as_if_each_were_alone(n):
    block = normal(4, n) * torch.tensor([[1.0], [0.2], [3.0], [1.0]])
    start = spread_out(4, 3) * torch.tensor([[1.0], [30.0], [0.01], [0.8]])
    options = {"absolute": False, "temperature": 0.1, "iterations": 30, "tolerance": 1e-2}
    together = step(block, start, **options)
    alone = [step(block[row : row + 1], start[row : row + 1], **options) for row in range(4)]
    for one, each in zip(together, zip(*alone, strict=True), strict=True):
        torch.testing.assert_close(one, torch.cat(each), rtol=1e-4, atol=1e-5)


def test_groups_too_sharp_for_float32_do_not_slow_down_the_others(monkeypatch):
    monkeypatch.setattr(soft_kmeans_exact, "_LEAST", 1 << 13)
    chosen = []

    class Spy(soft_kmeans_exact._Band):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            chosen.append(self.dtype)

    monkeypatch.setattr(soft_kmeans_exact, "_Band", Spy)
    start = spread_out(3, 4).clone()
    start[1, 3] = 1.0
    soft_kmeans(normal(3, 1 << 8), start, 1e-3, absolute=True)
    assert chosen == [torch.float32, torch.float64, torch.float32]


def test_half_precision_does_not_overflow_where_a_cluster_has_more_members_than_its_largest_number():
    block = normal(1, 1 << 19).half()
    weights, grad = step(block, spread_out(1, 2))
    expected, slopes = step(block.float(), spread_out(1, 2))
    assert block.numel() / 2 > torch.finfo(torch.float16).max
    torch.testing.assert_close(weights.float(), expected, rtol=1e-3, atol=1e-6)
    assert (grad.float() - slopes).norm() <= 1e-3 * slopes.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n", [1 << 8, 1 << 17])
def test_the_layout_in_memory_does_not_matter(dtype, n):
    block = normal(n, 1).to(dtype).expand(n, 2).T[:1]
    scattered = torch.stack([block[0], block[0]], dim=1)[:, 0][None]
    for one, other in zip(step(scattered, spread_out(1, 4)), step(block.contiguous(), spread_out(1, 4)), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("n", [1 << 8, 1 << 17])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_without_a_gradient_the_soft_weights_are_the_same(n, dtype):
    block = normal(1, n).to(dtype)
    expected, _ = step(block, spread_out(1, 4))
    found = soft_kmeans(block, spread_out(1, 4), 1e-4, absolute=True, tolerance=0.0)
    assert not found.weights.requires_grad
    assert not found.centroids.requires_grad
    assert torch.equal(found.weights, expected)


@pytest.mark.parametrize("n", [1 << 8, 1 << 17])
def test_centroids_and_masses_are_constants_to_the_gradient(n):
    found = soft_kmeans(normal(1, n).requires_grad_(), spread_out(1, 4), 0.1)
    assert found.weights.requires_grad
    assert not found.centroids.requires_grad


@pytest.mark.parametrize("value", [0.0, 0.1, -7e5, 1e30, 1e-42])
@pytest.mark.parametrize("n", [1, 5, 1 << 15])
@pytest.mark.parametrize("absolute", [False, True])
def test_a_constant_group_is_reproduced(value, n, absolute):
    block = torch.full((2, n), value)
    start = torch.stack([torch.linspace(-1, 1, 4), torch.full((4,), value)])
    weights, grad = step(block, start, 0.05, absolute=absolute)
    torch.testing.assert_close(weights, block, rtol=1e-6, atol=1e-7 if absolute else 0)
    assert grad.isfinite().all()


@pytest.mark.parametrize("scale", [1e-25, 1e-5, 1e10, 1e30])
@pytest.mark.parametrize("n", [100, 1 << 15])
def test_a_relative_temperature_means_the_same_at_any_scale(scale, n):
    block, start = normal(1, n, sigma=1.0), spread_out(1, 4, sigma=1.0)
    weights, grad = step(block.double(), start, 0.05, absolute=False)
    found, slopes = step((block.double() * scale).float(), start.double() * scale, 0.05, absolute=False)
    torch.testing.assert_close(found.double() / scale, weights, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(slopes.double() / scale, grad, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("n", [100, 1 << 15])
def test_numbers_too_small_for_float32_to_square_stay_finite(n):
    weights, grad = step(normal(1, n, sigma=1e-40), spread_out(1, 4, sigma=1e-40), 0.05, absolute=False)
    assert weights.isfinite().all()
    assert grad.isfinite().all()


@pytest.mark.parametrize(("n", "equal"), [(1 << 17, 1 << 16), (1 << 18, 1 << 11), (1 << 18, 1 << 8)])
def test_spikes_are_not_moved_to_the_middles_of_their_bins(path, n, equal):
    block = normal(1, n)
    block[0, :equal] = 0.01003
    start = spread_out(1, 4)
    found, expected = step(block, start), step(block.double(), start)
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert (found[1] - expected[1]).norm() <= 1e-4 * expected[1].norm()


def test_many_values_that_repeat_stay_where_they_are():
    block, start = (normal(1, 1 << 18) * 1e4).round() / 1e4, spread_out(1, 4)  # two thousand of them
    found, expected = step(block, start), step(block.double(), start)
    assert (found[0] - expected[0]).norm() <= 1e-5 * expected[0].norm()
    assert (found[1] - expected[1]).norm() <= 1e-4 * expected[1].norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("n", [5000, 1 << 17])
def test_every_path_has_the_implicit_gradient(dtype, n):
    block = normal(1, n).to(dtype)
    start = soft_kmeans(block.double(), spread_out(1, 3), 0.2, iterations=500, tolerance=0.0).centroids
    options = {"absolute": False, "temperature": 0.2, "iterations": 2, "implicit": True}
    (_, found), (_, expected) = step(block, start, **options), step(block.double(), start, **options)
    assert (found - expected).norm() <= max(1e-4, torch.finfo(dtype).eps) * expected.norm()


@pytest.mark.parametrize(
    ("block", "start"),
    [
        (normal(1, 1 << 15), spread_out(1, 4)),
        (normal(3, 1 << 13), spread_out(3, 4)),
        (normal(1, 1 << 17).half(), spread_out(1, 4)),
        (normal(2, 1 << 10), spread_out(2, 4)),
        (normal(2, 1 << 10), normal(2, 4, 3)),
    ],
    ids=["lines", "cubics", "fp16", "rows", "vectors"],
)
def test_the_default_dtype_of_torch_does_not_matter(default_dtype, block, start):
    expected, found = step(block, start), default_dtype(step, block, start)
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1], expected[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"tolerance": -1.0}, "tolerance must be 0"),
        ({"temperature": float("nan")}, "temperature must be a positive number"),
        ({"memory": 0}, "memory must be a positive number"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        soft_kmeans(torch.zeros(1, 3), torch.zeros(1, 2), **options)


def test_implicit_gradients_of_vectors_are_refused():
    with pytest.raises(ValueError, match="use implicit=False"):
        soft_kmeans(torch.zeros(1, 8), torch.zeros(1, 2, 2), implicit=True)
