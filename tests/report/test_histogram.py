"""Histograms counted piece by piece: those that numpy counts at once."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_r2.codecs.value_counts import MANY
from hf_r2.report.histogram import BIN_WIDTH, HALF, coarsened, histogram, reach

MIDDLES = np.arange(-HALF, HALF + 1)


def counted_by_numpy(weight, rms):
    """All elements at once, in bins of numpy's own whose ends reach to infinity."""
    edges = (np.arange(-HALF, HALF) + 0.5) * BIN_WIDTH * rms
    return np.histogram(weight.double().numpy(), [-np.inf, *edges, np.inf])[0]


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 200), st.sampled_from([1e-6, 0.3, 1.0, 7.0, 100.0]))
def test_it_counts_as_numpy_does(seed, numel, scale):
    weight = scale * torch.randn(numel, generator=torch.Generator().manual_seed(seed))
    assert histogram(weight, 0.9).tolist() == counted_by_numpy(weight, 0.9).tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_large_weights_of_any_dtype_are_counted_in_pieces(dtype):
    weight = torch.randn(700, MANY // 500, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert weight.numel() > MANY
    assert histogram(weight, 0.987).tolist() == counted_by_numpy(weight, 0.987).tolist()


def test_the_middle_bin_is_centred_at_zero_and_the_ends_hold_what_lies_beyond():
    counts = histogram(torch.tensor([0.0, 0.06, -0.06, 0.07, 2000.0, -2000.0, -2001.0]), rms=2.0)
    assert counts[HALF] == 3
    assert counts[HALF + 1] == 1
    assert (counts[0], counts[-1], counts.sum()) == (2, 1, 7)


@pytest.mark.parametrize("rms", [0.0, 1e-320, 1e300])
def test_a_unit_of_any_size_counts_every_element(rms):
    assert histogram(torch.zeros(3, 2), rms)[HALF] == 6
    assert histogram(torch.tensor([1e-30, -2.0]), rms).sum() == 2


def test_reach_is_the_outermost_occupied_bin():
    counts = np.zeros(2 * HALF + 1, int)
    assert reach(counts) == 0
    counts[HALF - 7] = counts[HALF + 3] = 1
    assert reach(counts) == 7


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(0, HALF), st.sampled_from([1, 3, 5, 97, 193, 1001]))
def test_merged_bins_are_few_symmetric_and_hold_every_element(seed, within, most):
    counts = np.random.default_rng(seed).integers(1, 9, 2 * HALF + 1) * (np.abs(MIDDLES) <= within)
    merged, edges = coarsened(counts, within, most)
    assert len(merged) == len(edges) - 1 <= most
    assert len(merged) % 2 == 1
    assert np.array_equal(edges, -edges[::-1])
    assert merged.tolist() == np.histogram(MIDDLES * BIN_WIDTH, edges, weights=counts)[0].tolist()
    assert merged.sum() == counts.sum()


def test_bins_are_merged_no_more_than_needed():
    counts = np.ones(2 * HALF + 1, int)
    assert [len(coarsened(counts, within, 97)[0]) for within in (0, 48, 49, 145, 146)] == [1, 97, 33, 97, 59]
