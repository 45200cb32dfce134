"""The percentile range of uniform grids, against NumPy's percentile."""

import json

import numpy as np
import pytest
import torch

from hf_r2.codecs import CodecSettings
from hf_r2.codecs import uniform as codec
from hf_r2.codecs.uniform import dequantize, percentile, quantize

PERCENTAGES = [0, 12.5, 50, 90, 99, 99.9, 99.99, 100]


@pytest.mark.parametrize("percentage", PERCENTAGES)
@pytest.mark.parametrize("shape", [(1, 1), (1, 2), (3, 7), (1, 1000), (50, 33), (2, 4096)])
@pytest.mark.parametrize("part", [1, 100, 1 << 20])
def test_percentiles_are_numpys(percentage, shape, part, monkeypatch):
    monkeypatch.setattr(codec, "_PART", part)
    block = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = np.percentile(block.double().numpy(), percentage, axis=1)
    np.testing.assert_allclose(percentile(block, percentage).numpy(), expected, rtol=1e-5, atol=1e-6)


def test_ties_and_outliers_do_not_disturb_a_percentile():
    block = torch.tensor([[1.0] * 900 + [2.0] * 99 + [1e30]])
    assert percentile(block, 50).item() == 1
    assert percentile(block, 95).item() == 2
    assert percentile(block, 100).item() == torch.tensor(1e30).item()


@pytest.mark.parametrize("percentage", [50, 95.5, 98])
@pytest.mark.parametrize(("grid", "steps"), [("restricted", 3), ("full", 3.5), ("midrise", 4)])
def test_a_symmetric_grid_reaches_to_the_percentile_of_the_magnitudes(percentage, grid, steps):
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(1))
    settings = CodecSettings(bits=3, grid=grid, range="percentile", percentile=percentage)
    codes, codebook = quantize(weight, settings)
    expected = np.percentile(weight.abs().double().numpy(), percentage, axis=1) / steps
    np.testing.assert_allclose(codebook["scale"].numpy(), expected, rtol=1e-5)
    highest = (2**3 - 1 - (3.5 if grid == "midrise" else 4)) * codebook["scale"]
    decoded = dequantize(codes, codebook, settings)
    beyond = weight > highest[:, None]
    assert beyond.any()
    assert torch.equal(decoded[beyond], highest[:, None].expand_as(weight)[beyond])


def test_an_affine_grid_reaches_from_percentile_to_percentile():
    weight = torch.randn(4, 500, generator=torch.Generator().manual_seed(2)) + 1
    settings = CodecSettings(bits=4, symmetric=False, range="percentile", percentile=98)
    codebook = quantize(weight, settings)[1]
    low, high = (np.percentile(weight.double().numpy(), p, axis=1) for p in (2, 98))
    scale = (np.maximum(high, 0) - np.minimum(low, 0)) / 15
    np.testing.assert_allclose(codebook["scale"].numpy(), scale, rtol=1e-5)
    assert codebook["zero"].tolist() == np.round(-np.minimum(low, 0) / scale).tolist()


@pytest.mark.parametrize("symmetric", [True, False])
def test_one_hundred_is_the_whole_range(symmetric):
    weight = torch.randn(5, 40, generator=torch.Generator().manual_seed(3))
    whole = quantize(weight, CodecSettings(symmetric=symmetric, grain=8))
    same = quantize(weight, CodecSettings(symmetric=symmetric, grain=8, range="percentile", percentile=100))
    assert torch.equal(whole[0], same[0])
    assert torch.equal(whole[1]["scale"], same[1]["scale"])


@pytest.mark.parametrize("symmetric", [True, False])
def test_a_group_that_is_zero_up_to_its_percentile_keeps_its_range(symmetric):
    weight = torch.zeros(2, 1000)
    weight[0, 7] = 5
    settings = CodecSettings(symmetric=symmetric, range="percentile", percentile=99)
    decoded = dequantize(*quantize(weight, settings), settings)
    assert decoded[0, 7].item() == pytest.approx(5)
    assert torch.equal(decoded[1], weight[1])


def test_settings_know_the_option():
    settings = CodecSettings(range="percentile")
    assert settings.percentile == 99.9
    assert CodecSettings(**json.loads(json.dumps(settings.to_dict()))) == settings
    assert "percentile" not in CodecSettings().to_dict()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"percentile": 99}, "percentile=99 needs range='percentile', not 'min_max'"),
        ({"percentile": 99, "range": "mse"}, "needs range='percentile', not 'mse'"),
        ({"percentile": 49, "range": "percentile"}, "percentile=49 is not a number from 50 to 100"),
        ({"percentile": 100.1, "range": "percentile"}, "is not a number from 50 to 100"),
        ({"percentile": "99", "range": "percentile"}, "is not a number from 50 to 100"),
        ({"percentile": True, "range": "percentile"}, "is not a number from 50 to 100"),
        ({"method": "palette", "percentile": 99}, "'percentile' is an option of method 'uniform'"),
    ],
)
def test_a_bad_percentage_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        CodecSettings(**given)
