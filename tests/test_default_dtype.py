"""Torch's default dtype, which users set to train in bfloat16 or float64, changes nothing of what hf_r2 computes."""

import copy

import pytest
import torch
from torch import nn

from hf_r2 import R2QuantizationConfig, RangeLoss
from hf_r2.aware import AWARE_GRIDS, AWARE_METHODS
from hf_r2.codecs import CodecSettings, encode
from hf_r2.quantization import attach

OF_INPUTS = ("lsq", "ewgs", "dorefa", "pact")


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(64, 48)


def assert_identical(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def train(layer, method, grain):
    """Outputs in training and evaluation, and gradients."""
    model = nn.Sequential(copy.deepcopy(layer))
    settings = {"grid": AWARE_GRIDS[method]} if method in AWARE_GRIDS else {}
    if method in OF_INPUTS:
        settings["activations"] = {"method": method, "bits": 4}
    attach(model, R2QuantizationConfig(AWARE_METHODS[method], 2, grain, aware=method, **settings))
    inputs = torch.randn(8, 64, dtype=torch.float32, generator=torch.Generator().manual_seed(1))
    outputs = model.train()(inputs)
    outputs.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    return [outputs.detach(), *gradients, model.eval()(inputs).detach()]


@pytest.mark.parametrize("method", AWARE_METHODS)
@pytest.mark.parametrize("grain", ["tensor", "channel"])
def test_compression_aware_training(layer, default_dtype, method, grain):
    expected = train(layer, method, grain)
    assert_identical(default_dtype(train, layer, method, grain), expected)


def restrict(layer, kind):
    """The loss, learnable values and gradients, under a factor that bfloat16 does not hold."""
    model = nn.Sequential(copy.deepcopy(layer))
    loss = RangeLoss(model, kind, factors={"0.weight": 0.3}, temperature=1.7 if kind == "soft_min_max" else None)
    value = loss.measure(0.7)
    loss.accumulate_grad_()
    return [value, *(values.detach() for values in loss.parameters()), model[0].weight.grad]


@pytest.mark.parametrize("kind", ["l_inf", "margin", "soft_min_max", "tail", "kurtosis"])
def test_range_losses(layer, default_dtype, kind):
    expected = restrict(layer, kind)
    assert_identical(default_dtype(restrict, layer, kind), expected)


@pytest.mark.parametrize(
    "settings",
    [
        CodecSettings("uniform", 3, "channel"),
        CodecSettings("uniform", 3, "channel", range="mse"),
        CodecSettings("uniform", 3, "channel", range="percentile"),
        CodecSettings("palette", 3, "tensor"),
        CodecSettings("palette", 4, "tensor", cluster_dim=2),
        CodecSettings("least_squares", 3, "channel"),
    ],
    ids=lambda settings: f"{settings.method}-{settings.range or settings.cluster_dim}",
)
def test_codecs(layer, default_dtype, settings):
    def coded():
        encoded = encode(layer.weight.detach(), settings, "weight")
        return [encoded.codes, *encoded.codebook.values()]

    expected = coded()
    assert_identical(default_dtype(coded), expected)
