"""Weights of 16 bits counted by value: what the codecs and the statistics make of the counts."""

import numpy as np
import pytest
import torch

from hf_r2.codecs import CodecSettings, decode, encode, sqnr
from hf_r2.codecs.kmeans import EXACT_POINTS, kmeans_1d
from hf_r2.codecs.value_counts import MANY, count_values, countable
from hf_r2.report.statistics import SQNR_BITS, tensor_statistics

HALVES = [torch.bfloat16, torch.float16]


def weight(dtype, outliers=True):
    torch.manual_seed(0)
    values = 0.02 * torch.randn(300, 700)
    if outliers:
        values[3, 5], values[7, 1] = 3.0, -1.5
    return values.to(dtype)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_counts_are_those_of_unique(dtype):
    values, counts = count_values([weight(dtype)[:100], weight(dtype)[100:]], dtype)
    expected, expected_counts = weight(dtype).double().unique(return_counts=True)
    assert torch.equal(values, expected)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_both_zeros_are_one_value(dtype):
    values, counts = count_values([torch.tensor([0.0, -0.0, 1.0, -0.0], dtype=dtype)], dtype)
    assert (values.tolist(), counts.tolist()) == ([0.0, 1.0], [3, 1])


def test_only_large_weights_of_16_bits_are_counted():
    assert countable(torch.float16, MANY)
    assert not countable(torch.float16, MANY - 1)
    assert not countable(torch.float32, MANY)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_tables_from_counts_are_as_good_as_those_from_all_elements(dtype, bits):
    row = weight(dtype).reshape(1, -1)
    ours, plain = kmeans_1d(row, 2**bits), kmeans_1d(row.float(), 2**bits)

    def error(table):
        return (row.double()[..., None] - table.double()).abs().amin(dim=-1).square().mean().item()

    assert torch.all(ours.diff(dim=1) > 0)
    assert error(ours) <= error(plain) * 1.01


def test_tables_from_few_values_are_the_optimum():
    # So few values that the dynamic programme has a point for each
    row = (weight(torch.bfloat16, outliers=False) * 512).round().bfloat16().reshape(1, -1)
    values, counts = (each.numpy() for each in count_values([row], row.dtype))
    assert 16 < len(values) < EXACT_POINTS
    table = kmeans_1d(row, 2)[0].double().numpy()

    def error(low, high):
        nearest = np.where(np.abs(values - low) <= np.abs(values - high), low, high)
        return float((counts * (values - nearest) ** 2).sum())

    splits = [np.split(np.arange(len(values)), [cut]) for cut in range(1, len(values))]
    means = [[np.average(values[part], weights=counts[part]) for part in split] for split in splits]
    assert error(*table) == pytest.approx(min(error(*pair) for pair in means), rel=1e-6)


def test_a_weight_of_few_values_is_its_own_table():
    row = torch.tensor([-1.5, 0.25, 2.0], dtype=torch.bfloat16).repeat(MANY // 3 + 1)[None]
    assert kmeans_1d(row, 4).tolist() == [[-1.5, 0.25, 2.0, 2.0]]
    assert torch.equal(decode(encode(row, CodecSettings("palette", 2, "tensor"))), row)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_statistics_from_counts_agree_with_numpy_float64(dtype):
    statistics = tensor_statistics("x", weight(dtype))
    values = weight(dtype).double().numpy()
    centred = values - values.mean()
    expected = {
        "min": values.min(),
        "max": values.max(),
        "range": values.max() - values.min(),
        "rms": np.sqrt((values**2).mean()),
        "crest_factor": np.abs(values).max() / np.sqrt((values**2).mean()),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2,
    }
    for name, value in expected.items():
        assert getattr(statistics, name) == pytest.approx(value, rel=1e-9), name


@pytest.mark.parametrize("bits", SQNR_BITS)
@pytest.mark.parametrize("dtype", [torch.float32, *HALVES], ids=str)
def test_sqnr_is_that_of_the_uniform_codec(dtype, bits):
    decoded = decode(encode(weight(dtype), CodecSettings("uniform", bits, "tensor")))
    assert tensor_statistics("x", weight(dtype)).sqnr[bits] == pytest.approx(sqnr(weight(dtype), decoded), rel=1e-9)
