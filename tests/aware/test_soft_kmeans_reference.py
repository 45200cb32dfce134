"""Soft k-means against plain float64 autograd, in every regime that has a path of its own."""

import pytest
import torch
from benchmarks.measuring import extra_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.aware.soft_kmeans import soft_kmeans

N = 1 << 16
DISTRIBUTIONS = {
    "normal": lambda g: torch.randn(N, generator=g),
    "laplace": lambda g: torch.randn(N, generator=g) * torch.empty(N).exponential_(generator=g).sqrt(),
    "uniform": lambda g: torch.rand(N, generator=g) * 3.4 - 1.7,
    "outliers": lambda g: torch.cat([torch.randn(N - 2, generator=g), torch.tensor([100.0, -100.0])]),
}


def reference(block, centroids, temperature, absolute, iterations):
    """Soft k-means as it is defined, with all iterations in the graph; vectors are completed around the row."""
    d = centroids.shape[2] if centroids.dim() == 3 else 1
    n = block.shape[1]
    around = block.detach()[:, torch.arange(-n % d) % n]
    values = torch.cat([block, around], dim=1).view(len(block), -1, 1, d)
    tau = temperature if absolute else temperature * block.detach().var(dim=1, correction=0)[:, None, None]
    centroids = centroids.reshape(len(block), -1, d).to(block)
    for _ in range(iterations):
        attention = (-(values - centroids[:, None]).square().sum(dim=3) / tau).softmax(dim=2)
        mass = attention.sum(dim=1)[:, :, None]
        means = torch.einsum("gmk,gmd->gkd", attention, values[:, :, 0]) / mass
        centroids = torch.where(mass > 1e-12, means, centroids)
    return torch.einsum("gmk,gkd->gmd", attention, centroids).flatten(1)[:, :n], centroids


def error(found, expected):
    return ((found.double() - expected).norm() / expected.norm()).item()


def compare(block, centroids, temperature, absolute=False, iterations=3, **options):
    """Relative errors of soft weights, gradient and centroids."""
    upstream = torch.randn(block.shape, generator=torch.Generator().manual_seed(9)) + 0.5
    leaf = block.clone().requires_grad_()
    soft = soft_kmeans(leaf, centroids, temperature, absolute=absolute, iterations=iterations, tolerance=0.0, **options)
    soft.weights.backward(upstream.to(block.dtype))
    exact = block.double().requires_grad_()
    weights, ends = reference(exact, centroids, temperature, absolute, iterations)
    weights.backward(upstream.to(block.dtype).double())
    assert soft.weights.dtype == leaf.grad.dtype == block.dtype
    ends = ends.reshape(centroids.shape)
    return error(soft.weights, weights.detach()), error(leaf.grad, exact.grad), error(soft.centroids, ends.detach())


def quantiles(values, k):
    return values.float().quantile((torch.arange(k) + 0.5) / k)[None]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize(("k", "temperature"), [(2, 0.1), (2, 0.03), (4, 0.1), (4, 0.02), (16, 0.05), (16, 0.008)])
@pytest.mark.parametrize("sigma", [0.02, 1.0])
def test_scalars_agree_with_float64(distribution, k, temperature, sigma):
    values = sigma * DISTRIBUTIONS[distribution](torch.Generator().manual_seed(k))
    weights, gradient, centroids = compare(values[None], quantiles(values, k), temperature)
    assert weights <= 2e-5
    assert gradient <= 1e-4
    assert centroids <= 1e-5


@pytest.mark.parametrize("k", [2, 4, 16])
@pytest.mark.parametrize(("absolute", "most"), [(1e-4, 1e-4), (1e-5, 5e-4)])
@pytest.mark.parametrize("start", ["quantiles", "linspace", "random"])
def test_an_absolute_temperature_as_small_as_coremltools_is_exact_enough(k, absolute, most, start):
    values = 0.03 * DISTRIBUTIONS["normal"](torch.Generator().manual_seed(0))
    starts = {
        "quantiles": quantiles(values, k),
        "linspace": torch.linspace(values.min(), values.max(), k)[None],
        "random": values[torch.randperm(N, generator=torch.Generator().manual_seed(1))[:k]].sort().values[None],
    }
    assert compare(values[None], starts[start], absolute, absolute=True)[1] <= most


@pytest.mark.parametrize("temperature", [1e-4, 1e-6])
def test_where_tables_would_fail_the_exact_path_takes_over(temperature):
    values = DISTRIBUTIONS["outliers"](torch.Generator().manual_seed(0))
    assert compare(values[None], quantiles(values, 4), temperature, absolute=True)[1] <= 1e-4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("k", [2, 4, 16])
def test_half_precision_agrees_but_for_the_rounding_of_its_own_results(dtype, k):
    values = (0.03 * torch.randn(1 << 18, generator=torch.Generator().manual_seed(0))).to(dtype)
    weights, gradient, centroids = compare(values[None], quantiles(values, k), 1e-4, absolute=True)
    assert weights <= torch.finfo(dtype).eps
    assert gradient <= torch.finfo(dtype).eps
    assert centroids <= 1e-4


@pytest.mark.parametrize("groups", [(32, 2048), (300, 100), (2000, 8)])
@pytest.mark.parametrize("k", [2, 16])
def test_groups_agree_with_float64(groups, k):
    block = torch.randn(groups, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, groups[0])[:, None]
    start = torch.stack([quantiles(row, k)[0] for row in block])
    assert max(compare(block, start, 0.05)) <= 1e-4


@pytest.mark.parametrize(("d", "k"), [(2, 4), (2, 16), (4, 16), (3, 5), (64, 4)])
@pytest.mark.parametrize("n", [4096, 1001, 3])
def test_vectors_agree_with_float64(d, k, n):
    block = torch.randn(2, n, generator=torch.Generator().manual_seed(0))
    start = torch.randn(2, k, d, generator=torch.Generator().manual_seed(1))
    assert max(compare(block, start, 0.3)) <= 1e-4


@pytest.mark.parametrize("iterations", [1, 2, 20])
def test_any_number_of_iterations_agrees(iterations):
    values = DISTRIBUTIONS["normal"](torch.Generator().manual_seed(0))
    assert max(compare(values[None], quantiles(values, 4), 0.05, iterations=iterations)) <= 1e-4


def test_float64_is_exact():
    values = DISTRIBUTIONS["normal"](torch.Generator().manual_seed(0)).double()
    assert max(compare(values[None], quantiles(values, 4).double(), 0.05)) <= 1e-11


@pytest.mark.parametrize("shape", [(1, 2), (3, 4), (1, 3, 2)])
def test_gradcheck(shape):
    block = torch.randn(shape[0], 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    # A relative temperature is constant to the gradient, but not to finite differences
    torch.autograd.gradcheck(lambda x: soft_kmeans(x, start, 0.4, absolute=True, tolerance=0.0).weights, block)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(
        st.lists(st.sampled_from([0.0, 0.0, 1.0, -1.0, 0.5, 3e-3]), min_size=5, max_size=5), min_size=1, max_size=4
    ),
    k=st.integers(1, 8),
    temperature=st.sampled_from([1e-3, 0.1, 2.0]),
    same=st.booleans(),
)
def test_ties_zeros_and_duplicate_centroids_stay_finite(rows, k, temperature, same):
    block = torch.tensor(rows).requires_grad_()
    start = torch.zeros(len(rows), k) if same else torch.linspace(-1, 1, k).expand(len(rows), k)
    soft = soft_kmeans(block, start, temperature)
    soft.weights.sum().backward()
    assert soft.weights.isfinite().all()
    assert block.grad.isfinite().all()
    assert soft.centroids.isfinite().all()
    assert soft.weights.max() <= block.max() + 1e-5
    torch.testing.assert_close(soft.masses.sum(dim=1).float(), torch.full((len(rows),), 5.0))


def test_a_cluster_without_mass_keeps_its_centroid():
    values = torch.linspace(-1, 1, 1000)[None]
    soft = soft_kmeans(values, torch.tensor([[-0.5, 0.5, 80.0]]), 1e-3)
    assert soft.centroids[0, 2] == 80
    assert soft.masses[0, 2] < 1e-6


def test_the_implicit_gradient_is_that_of_very_many_iterations():
    values = 0.03 * torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    start = soft_kmeans(values.double(), quantiles(values[0], 2).double(), 0.1, iterations=300, tolerance=0.0).centroids
    leaf, exact = values.clone().requires_grad_(), values.double().requires_grad_()
    upstream = torch.randn(values.shape, generator=torch.Generator().manual_seed(1))
    soft_kmeans(leaf, start, 0.1, implicit=True, iterations=50, tolerance=0.0).weights.backward(upstream)
    reference(exact, start, 0.1, False, 200)[0].backward(upstream.double())
    assert error(leaf.grad, exact.grad) <= 1e-3


def test_iterations_end_early_once_no_centroid_moves():
    values = torch.randn(1, 4000, generator=torch.Generator().manual_seed(0))
    start = quantiles(values[0], 2)
    settled = soft_kmeans(values, start, 0.1, iterations=100, tolerance=0.0).centroids
    assert torch.allclose(soft_kmeans(values, start, 0.1, iterations=100).centroids, settled, atol=1e-3)
    loose = soft_kmeans(values, start, 0.1, iterations=100, tolerance=10.0).centroids
    assert torch.equal(loose, soft_kmeans(values, start, 0.1, iterations=1).centroids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3), torch.zeros(1, 2), 0.1), "cut weights with"),
        ((torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 2), 0.1), "the block must be float16"),
        ((torch.zeros(2, 3), torch.zeros(1, 2), 0.1), "2 groups"),
        ((torch.zeros(2, 3), torch.zeros(2, 2), 0.0), "temperature must be a positive number"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        soft_kmeans(*arguments)


def test_the_implicit_gradient_of_many_clusters_is_refused():
    with pytest.raises(ValueError, match="k ≤ 4"):
        soft_kmeans(torch.zeros(1, 9), torch.zeros(1, 8), 0.1, implicit=True)


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [3, 20])
def test_sixteen_million_weights_and_sixteen_clusters_take_three_and_a_half_times_their_memory(iterations):
    block = (0.03 * torch.randn(1, 1 << 24, generator=torch.Generator().manual_seed(0))).requires_grad_()
    upstream = torch.ones_like(block)
    start = quantiles(block.detach()[0, : 1 << 16], 16)

    def step():
        soft_kmeans(block, start, 0.02, iterations=iterations, tolerance=0.0).weights.backward(upstream)

    assert extra_bytes(step, cuda=False) <= 3.5 * block.nbytes


def test_the_exact_path_heeds_its_memory():
    block = torch.randn(64, 4096, generator=torch.Generator().manual_seed(0)).requires_grad_()
    start = torch.randn(64, 16, 4, generator=torch.Generator().manual_seed(1))

    def step():
        soft_kmeans(block, start, 0.3, memory=1 << 20).weights.sum().backward()

    assert extra_bytes(step, cuda=False) <= 3.5 * block.nbytes + (2 << 20)
