import math

import numpy as np
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_r2.moments import shapes
from hf_r2.report.statistics import SQNR_BITS, weight_statistics


def crest_factor(weight):
    return shapes([weight])[0].crest_factor


@pytest.fixture
def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.Conv2d(3, 4, 3), nn.Embedding(5, 4), nn.LayerNorm(4), Conv1D(6, 9))


def slow_sqnr(values, bits):
    steps = 2 ** (bits - 1) - 1
    scale = np.abs(values).max() / steps
    noise = values - np.clip(np.round(values / scale), -steps, steps) * scale
    return 10 * np.log10(np.sum(values**2) / np.sum(noise**2))


REFERENCES = {
    "min": np.min,
    "max": np.max,
    "rms": lambda values: np.sqrt(np.mean(values**2)),
    "range": lambda values: np.max(values) - np.min(values),
    "crest_factor": lambda values: np.max(np.abs(values)) / np.sqrt(np.mean(values**2)),
    "kurtosis": lambda values: np.mean((values - np.mean(values)) ** 4) / np.var(values) ** 2,
}


def linear(values, dtype=torch.float32):
    layer = nn.Linear(2, 2, bias=False, dtype=dtype)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(values))
    return layer


def test_rows_are_the_selection_in_order(model):
    assert [row.name for row in weight_statistics(model)] == ["0.weight", "1.weight", "4.weight"]


def test_selection_options_are_passed_on(model):
    rows = weight_statistics(model, include=["0.weight", "1.weight", "2.weight"], exclude=["1.*"], min_numel=21)
    assert [row.name for row in rows] == ["0.weight"]


@pytest.mark.parametrize(("index", "shape"), [(0, (16, 8)), (1, (4, 3, 3, 3))])
def test_shape_is_the_parameters(model, index, shape):
    assert weight_statistics(model)[index].shape == shape


def test_shape_of_a_transformers_conv1d_is_the_parameters(model):
    assert weight_statistics(model)[2].shape == tuple(model[4].weight.shape)


@pytest.mark.parametrize("statistic", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_statistics_agree_with_numpy_float64(model, statistic, dtype):
    model = model.to(dtype)
    for row, layer in zip(weight_statistics(model), (model[0], model[1], model[4]), strict=True):
        expected = REFERENCES[statistic](layer.weight.detach().double().numpy())
        assert getattr(row, statistic) == pytest.approx(expected, rel=1e-6)


def test_sqnr_covers_its_bit_widths(model):
    assert [tuple(row.sqnr) for row in weight_statistics(model)] == [SQNR_BITS] * 3


@pytest.mark.parametrize("bits", SQNR_BITS)
def test_sqnr_agrees_with_numpy_float64(model, bits):
    for row, layer in zip(weight_statistics(model), (model[0], model[1], model[4]), strict=True):
        assert row.sqnr[bits] == pytest.approx(slow_sqnr(layer.weight.detach().double().numpy(), bits), abs=1e-3)


def test_sqnr_of_weights_on_the_grid_is_infinite():
    (row,) = weight_statistics(linear([[1.0, -1.0], [0.0, 1.0]]))
    assert row.sqnr[2] == math.inf


@pytest.mark.parametrize("value", [1e-25, 1e-3, 0.3, 7.0, 1e25])
def test_crest_factor_of_two_values_of_one_magnitude_is_one(value):
    weight = torch.tensor([[value, -value], [-value, value]])
    assert crest_factor(weight).item() == pytest.approx(1, rel=1e-6)


def test_crest_factor_of_uniform_weights_is_the_root_of_three():
    weight = torch.linspace(-1, 1, 10_001)
    assert crest_factor(weight).item() == pytest.approx(math.sqrt(3), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_crest_factor_of_half_precision_is_computed_in_float32(dtype):
    weight = torch.linspace(-1, 1, 1001).to(dtype)
    assert torch.equal(crest_factor(weight), crest_factor(weight.float()))


def test_crest_factor_of_zeros_is_zero():
    assert crest_factor(torch.zeros(3, 4)) == 0


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_kurtosis_of_a_constant_weight_is_zero(value):
    (row,) = weight_statistics(linear([[value] * 2] * 2))
    assert row.kurtosis == 0


def test_weights_are_left_as_they_were(model):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weight_statistics(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_weights_that_are_not_finite_raise_with_their_name(model, value):
    with torch.no_grad():
        model[1].weight[0, 1, 2, 0] = value
    with pytest.raises(ValueError, match=r"weight '1\.weight' has NaN or infinite values"):
        weight_statistics(model)


def test_an_empty_selection_raises():
    with pytest.raises(ValueError, match="no weight of Embedding is selected"):
        weight_statistics(nn.Embedding(3, 4))
