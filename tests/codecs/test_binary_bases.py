import itertools

import numpy as np
import pytest
import torch
from benchmarks.least_squares import shortcut
from benchmarks.measuring import extra_bytes
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs import splits
from hf_r2.codecs.binary_bases import fold, greedy, levels, nearest_codes, solve, warm_two


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def squared_error(block, basis, code=fold):
    """Of every group, in float64."""
    return (levels(basis).gather(1, code(block, basis).long()).double() - block.double()).square().sum(dim=1)


def mean_error(block, basis, code=fold):
    return (squared_error(block, basis, code) / block.shape[1]).mean().item()


# --- references: every split, every pattern of signs ------------------------------------------------------------------


def best_two_by_hand(values):
    """Least error of two means, over all splits of the sorted magnitudes."""
    ordered = np.sort(np.abs(values))
    sides = ((ordered[:i], ordered[i:]) for i in range(1, len(ordered)))
    return min((sum(((side - side.mean()) ** 2).sum() for side in both) for both in sides), default=0.0)


def best_ternary_by_hand(values):
    ordered = np.sort(np.abs(values))
    return min((ordered[:i] ** 2).sum() + ((ordered[i:] - ordered[i:].mean()) ** 2).sum() for i in range(len(ordered)))


def best_by_all_signs(values, bits):
    """Least error of any scales: least squares for every way to give every element its signs."""
    x, least = np.asarray(values), np.inf
    for pattern in itertools.product(itertools.product((-1.0, 1.0), repeat=bits), repeat=len(x)):
        signs = np.array(pattern)
        scales = np.linalg.lstsq(signs, x, rcond=None)[0]
        least = min(least, ((x - signs @ scales) ** 2).sum())
    return least


def greedy_by_hand(values, bits):
    left, scales = np.asarray(values, dtype=np.float64), []
    for _ in range(bits):
        scales.append(np.abs(left).mean())
        left = left - scales[-1] * np.where(left >= 0, 1, -1)
    return scales


AWKWARD = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.0, 100.0, 0.5, -3.0]), st.floats(-4, 4, width=32, allow_subnormal=False)
)


@settings(deadline=None, max_examples=400)
@given(st.lists(AWKWARD, min_size=1, max_size=12))
def test_two_bits_and_ternary_are_optimal_among_all_splits(values):
    block = torch.tensor([values])
    slack = 1e-6 * block.double().square().sum().item()
    for basis, reference in (("optimal", best_two_by_hand), ("ternary", best_ternary_by_hand)):
        scales = solve(block, 2, basis)
        assert (scales >= 0).all()
        assert scales[0, 0] >= scales[0, 1]
        expected = reference(np.asarray(values))
        assert squared_error(block, scales).item() == pytest.approx(expected, rel=1e-5, abs=slack + 1e-30)


@settings(deadline=None, max_examples=60)
@given(st.lists(AWKWARD, min_size=1, max_size=5))
def test_one_and_two_bits_are_optimal_among_all_signs(values):
    block = torch.tensor([values])
    slack = 1e-6 * block.double().square().sum().item()
    for bits in (1, 2):
        found = squared_error(block, solve(block, bits)).item()
        assert found == pytest.approx(best_by_all_signs(values, bits), rel=1e-5, abs=slack + 1e-30)


@pytest.mark.parametrize("n", [2, 3, 5, 9, 27])
def test_thousands_of_small_groups_are_optimal(n):
    block = torch.cat([normal(1500, n, seed=n), normal(500, n).round(), normal(500, n) ** 5, normal(500, n).relu()])
    for basis, reference in (("optimal", best_two_by_hand), ("ternary", best_ternary_by_hand)):
        expected = torch.tensor([reference(row) for row in block.double().numpy()])
        scale = block.double().square().sum(dim=1)
        assert ((squared_error(block, solve(block, 2, basis)) - expected).abs() <= 1e-6 * scale).all()


@settings(deadline=None, max_examples=200)
@given(st.lists(AWKWARD, min_size=1, max_size=12), st.integers(1, 8))
def test_greedy_scales_are_means_of_what_is_left_over(values, bits):
    scales = greedy(torch.tensor([values]), bits)
    assert scales.dtype == torch.float32
    largest = max(map(abs, values))
    np.testing.assert_allclose(scales[0], greedy_by_hand(values, bits), rtol=1e-4, atol=1e-6 * largest)


# --- distributions ----------------------------------------------------------------------------------------------------


def of_unit_variance(kind, n=1_000_000):
    torch.manual_seed(0)
    match kind:
        case "normal":
            return torch.randn(1, n)
        case "laplace":
            return torch.distributions.Laplace(0, 0.5**0.5).sample((1, n))
        case "uniform":
            return (2 * torch.rand(1, n) - 1) * 3**0.5


# Figures of the paper's setting, computed from 1e6 samples: scales and mean squared errors
REFERENCE = [
    ("normal", 1, "optimal", (0.7979,), 0.3634),
    ("normal", 2, "optimal", (0.982, 0.530), 0.1175),
    ("normal", 2, "ternary", (0.612, 0.612), 0.190),
    ("normal", 2, "greedy", (0.798, 0.483), 0.131),
    ("normal", 3, "greedy", None, 0.0586),
    ("normal", 4, "greedy", None, 0.0331),
    ("laplace", 1, "optimal", None, 0.500),
    ("laplace", 2, "optimal", (1.128, 0.708), 0.1765),
    ("laplace", 2, "ternary", None, 0.2645),
    ("laplace", 2, "greedy", None, 0.230),
    ("uniform", 1, "optimal", None, 0.25),
    ("uniform", 2, "optimal", None, 0.0625),
    ("uniform", 2, "ternary", None, 0.111),
    ("uniform", 2, "greedy", None, 0.0625),
]


@pytest.mark.parametrize(("kind", "bits", "basis", "scales", "error"), REFERENCE)
def test_scales_and_errors_on_known_distributions(kind, bits, basis, scales, error):
    block = of_unit_variance(kind)
    found = solve(block, bits, basis)
    assert mean_error(block, found) == pytest.approx(error, rel=0.01)
    if scales:
        assert found[0].tolist() == pytest.approx(scales, abs=0.005)


def exact_long(block, basis):
    """Least error over all splits of one long row, from its sorted magnitudes in float64."""
    ordered = np.sort(np.abs(block.double().numpy()))
    n, sums = len(ordered), np.concatenate([[0], np.cumsum(ordered)])
    i = np.arange(1, n)
    low, high = sums[1:-1], sums[-1] - sums[1:-1]
    saved = high**2 / (n - i) + (low**2 / i if basis == "optimal" else 0)
    return ((ordered**2).sum() - max(saved.max(), sums[-1] ** 2 / n)) / n


LONG = {
    "normal": lambda: of_unit_variance("normal"),
    "laplace": lambda: of_unit_variance("laplace"),
    "uniform": lambda: of_unit_variance("uniform"),
    "64 outliers at 100 sigma": lambda: torch.cat([of_unit_variance("normal"), torch.full((1, 64), -100.0)], dim=1),
    "outliers at a million sigma": lambda: torch.cat([normal(1, 300_000), torch.full((1, 9), 1e6)], dim=1),
    "half precision": lambda: normal(1, 300_000).half().float(),
    "few values": lambda: normal(1, 300_000).mul(2).round(),
    "mostly zeros": lambda: normal(1, 300_000) * (normal(1, 300_000, seed=1) > 1),
    "tiny": lambda: normal(1, 300_000) * 1e-30,
    "two clusters": lambda: torch.cat([normal(1, 150_000), 9 + normal(1, 150_000)], dim=1),
    "a power": lambda: normal(1, 200_000) ** 7,
}


@pytest.mark.parametrize("kind", LONG)
@pytest.mark.parametrize("basis", ["optimal", "ternary"])
def test_long_rows_are_optimal_to_rounding(kind, basis):
    block = LONG[kind]()
    assert block.shape[1] >= splits.LONG
    gain = splits.two_level_gain if basis == "optimal" else splits.zero_below_gain
    binned = splits.best_split(block, gain)
    ordered = splits._split_sorted(splits.sort_magnitudes(block), gain)
    n = block.shape[1]
    saved = [gain(split.count, split.first, n, split.total).item() for split in (binned, ordered)]
    assert saved[0] == pytest.approx(saved[1], rel=1e-12)
    assert binned.total.item() == pytest.approx(block.double().abs().sum().item(), rel=1e-12)
    if kind != "outliers at a million sigma":  # whose levels are closer together than float32 numbers of their size
        found = mean_error(block, solve(block, 2, basis))
        assert found == pytest.approx(exact_long(block[0], basis), rel=1e-9 if "100 sigma" not in kind else 1e-8)


@pytest.mark.parametrize("value", [0.0, 0.3, -2.5, 3.4e38])
def test_long_rows_of_one_value(value):
    block = torch.full((2, splits.LONG + 5), value)
    scales = torch.stack([torch.full((2,), abs(value)), torch.zeros(2)], dim=1)
    torch.testing.assert_close(solve(block, 2), scales, rtol=1e-6, atol=1e-6 * abs(value))


def test_bins_count_and_sum_what_lies_between_their_edges():
    row = torch.cat([normal(200_001), torch.tensor([0.0, -0.0, 1e-42, 50.0])])
    bins = splits.magnitude_bins(row)
    ordered = row.abs().double().sort().values
    below = torch.searchsorted(ordered, bins.edges)
    below[0] = 0  # what is smaller counts as the first edge
    assert torch.equal(bins.count, below.double())
    sums = torch.cat([torch.zeros(1, dtype=torch.float64), ordered.cumsum(0)])
    torch.testing.assert_close(bins.first, sums[below], rtol=1e-12, atol=1e-12)


# --- more bits, groups, dtypes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1000])
def test_optimal_scales_are_never_worse_than_greedy_ones_or_one_bit(bits, n):
    block = torch.cat([normal(40, n), normal(20, n) ** 3, normal(20, n).round(), torch.zeros(1, n), torch.ones(1, n)])
    found = solve(block, bits)
    assert found.shape == (82, bits)
    assert (found >= 0).all()
    assert (found.diff(dim=1) <= 0).all()
    slack = 1e-6 * block.double().square().sum(dim=1)
    error = squared_error(block, found, nearest_codes)
    assert (error <= squared_error(block, greedy(block, bits)) + slack).all()
    assert (error <= squared_error(block, greedy(block, 1)) + slack).all()


def test_refinement_pays():
    block = normal(1, 100_000)
    ratios = {
        bits: mean_error(block, solve(block, bits), nearest_codes) / mean_error(block, greedy(block, bits))
        for bits in (3, 4)
    }
    assert ratios[3] < 0.7
    assert ratios[4] < 0.5


@pytest.mark.parametrize("outliers", [0, 64])
def test_rows_beyond_the_memory_limit_are_refined_on_their_histogram(monkeypatch, outliers):
    block = torch.cat([normal(1, 200_000), torch.full((1, outliers), 100.0)], dim=1)
    whole = solve(block, 4)
    monkeypatch.setattr("hf_r2.codecs.binary_bases._LONG", 1000)
    binned = solve(block, 4)
    assert mean_error(block, binned, nearest_codes) <= 1.01 * mean_error(block, whole, nearest_codes)
    assert mean_error(block, binned, nearest_codes) <= mean_error(block, greedy(block, 4))


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_memory_stays_within_a_few_copies_of_a_long_row(bits):
    block = normal(1, 3_000_000)
    assert extra_bytes(lambda: solve(block, bits), cuda=False) < 1.5 * block.nbytes
    assert extra_bytes(lambda: nearest_codes(block, greedy(block[:, :9], bits)), cuda=False) < 1.5 * block.nbytes


def test_groups_are_solved_alone_and_alike():
    block = normal(70, 50) * torch.logspace(-20, 20, 70)[:, None]
    for bits, basis in ((1, "optimal"), (2, "optimal"), (2, "ternary"), (3, "optimal"), (5, "greedy")):
        together = solve(block, bits, basis)
        alone = torch.cat([solve(row[None], bits, basis) for row in block])
        torch.testing.assert_close(together, alone, rtol=2e-6, atol=0)


@pytest.mark.parametrize("basis", ["optimal", "ternary", "greedy"])
def test_groups_of_zeros_have_no_scale(basis):
    assert not solve(torch.zeros(3, 5), 2, basis).any()
    assert not solve(torch.zeros(1, 5), 8 if basis != "ternary" else 2, basis).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scales_are_float32_for_any_dtype(dtype):
    block = normal(4, 90).to(dtype)
    for bits in (1, 2, 3):
        scales = solve(block, bits)
        assert scales.dtype == torch.float32
        assert torch.equal(scales, solve(block.float(), bits))


def test_a_block_that_is_not_contiguous_is_solved_alike():
    block = normal(90, 4).T
    for bits in (1, 2, 3):
        assert torch.equal(solve(block, bits), solve(block.contiguous(), bits))


def test_an_empty_block_is_refused():
    with pytest.raises(ValueError, match="no elements"):
        solve(torch.empty(3, 0), 2)


# --- codes ------------------------------------------------------------------------------------------------------------


def test_levels_are_the_signed_sums_with_the_first_scale_in_the_lowest_bit():
    assert levels(torch.tensor([[4.0, 2.0, 1.0]])).tolist() == [[-7.0, 1.0, -3.0, 5.0, -5.0, 3.0, -1.0, 7.0]]


@settings(deadline=None, max_examples=200)
@given(st.lists(AWKWARD, min_size=1, max_size=9), st.lists(st.floats(0, 4, width=32), min_size=1, max_size=8))
def test_codes_fold_or_name_the_nearest_level(values, scales):
    block, basis = torch.tensor([values]), torch.tensor([scales])
    folded, near = fold(block, basis), nearest_codes(block, basis)
    table = levels(basis)[0].double().numpy()
    for value, code, nearest in zip(values, folded[0].tolist(), near[0].tolist(), strict=True):
        left = np.float32(value)
        for index, scale in enumerate(scales):
            positive = left >= 0
            assert bool(code >> index & 1) == positive
            left = np.float32(left - np.float32(scale if positive else -scale))
        assert abs(table[nearest] - value) <= abs(table - value).min() + 1e-6


@pytest.mark.parametrize("basis", ["optimal", "ternary"])
def test_folding_names_the_nearest_level_of_two_bits(basis):
    block = normal(30, 200)
    scales = solve(block, 2, basis)
    near = squared_error(block, scales, nearest_codes)
    torch.testing.assert_close(squared_error(block, scales), near, rtol=1e-6, atol=0)


def test_zero_has_positive_signs_first():
    assert fold(torch.tensor([[0.0, -0.0]]), torch.tensor([[1.0]])).tolist() == [[1, 1]]
    assert fold(torch.tensor([[0.0]]), torch.tensor([[2.0, 1.0]])).tolist() == [[1]]
    assert nearest_codes(torch.tensor([[0.0]]), torch.tensor([[2.0, 1.0]])).tolist() == [[2]]


# --- warm sweeps ------------------------------------------------------------------------------------------------------


def test_warm_sweeps_never_raise_the_error_and_settle_on_the_optimum():
    block = torch.cat([normal(20, 500), normal(20, 500) ** 3])
    scales = greedy(block, 2)
    error = squared_error(block, scales)
    for _ in range(60):
        scales = warm_two(block, scales)
        improved = squared_error(block, scales)
        assert (improved <= error * (1 + 1e-6)).all()
        error = improved
    torch.testing.assert_close(scales[:20], solve(block[:20], 2), rtol=0.02, atol=0)


def test_a_warm_sweep_takes_the_means_on_both_sides():
    block = torch.tensor([[1.0, -3.0, 5.0, -7.0]])
    assert warm_two(block, torch.tensor([[4.0, 1.0]])).tolist() == [[4.0, 2.0]]
    assert warm_two(block, torch.tensor([[2.0, 1.0]])).tolist() == [[3.0, 2.0]]


@pytest.mark.parametrize("threshold", [0.0, 0.5, 7.0, 100.0])
def test_a_warm_sweep_of_magnitudes_on_one_side_begins_with_one_bit(threshold):
    block = torch.tensor([[1.0, -3.0, 5.0, -7.0]])
    assert warm_two(block, torch.tensor([[threshold, 0.1]])).tolist() == [[4.0, 0.0]]


def test_one_warm_sweep_follows_a_weight_in_training():
    block = normal(16, 4608)
    scales = solve(block, 2)
    for step in range(20):
        block = block + 0.01 * normal(16, 4608, seed=step)
        scales = warm_two(block, scales)
    best = squared_error(block, solve(block, 2))
    assert (squared_error(block, scales) <= 1.001 * best).all()


# --- beside the shortcut: the nearest data value for v_1, found on every third element --------------------------------


@pytest.mark.parametrize(
    ("n", "skip", "mean", "most"),
    [(27, 1, (1.03, 1.2), (1.5, 6)), (576, 3, (1.004, 1.03), (1.03, 1.4)), (2304, 3, (1.001, 1.006), (1.01, 1.06))],
)
def test_channels_beside_the_shortcut(n, skip, mean, most):
    block = normal(600, n)
    ratio = squared_error(block, shortcut(block, skip)) / squared_error(block, solve(block, 2))
    assert ratio.min() >= 1 - 1e-6
    assert mean[0] < ratio.mean() < mean[1]
    assert most[0] < ratio.max() < most[1]
    assert (squared_error(block, greedy(block, 2)) >= squared_error(block, solve(block, 2)) * (1 - 1e-6)).all()
