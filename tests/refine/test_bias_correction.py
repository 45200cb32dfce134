"""Bias correction: the formulas against integrals, and shifts that are gone afterwards."""

import numpy as np
import pytest
import torch
from refine_models import MODELS, build, images
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from hf_r2.codecs import CodecSettings, decode, encode
from hf_r2.refine import correct_bias, equalize, expected_outputs
from hf_r2.refine.bias_correction import expected_inputs, matrix_layers, relu_mean
from hf_r2.refine.capture import output_means, trace
from hf_r2.selection import output_first, select_weights


@torch.no_grad()
def compress(model, bits=3):
    selection = select_weights(model)
    for module, _ in selection.values():
        weight = output_first(module, module.weight)
        module.weight.copy_(output_first(module, decode(encode(weight, CodecSettings(bits=bits, grain="tensor")))))


@pytest.mark.parametrize("mean", [-3.0, -0.5, 0.0, 0.5, 4.0])
@pytest.mark.parametrize("deviation", [0.1, 1.0, 2.5])
@pytest.mark.parametrize("highest", [np.inf, 6.0])
def test_the_mean_of_a_clipped_normal_is_the_integral(mean, deviation, highest):
    z = np.linspace(mean - 12 * deviation, mean + 12 * deviation, 400_001)
    density = np.exp(-(((z - mean) / deviation) ** 2) / 2) / (deviation * np.sqrt(2 * np.pi))
    expected = np.trapezoid(np.clip(z, 0, highest) * density, z)
    moments = torch.tensor(mean, dtype=torch.float64), torch.tensor(deviation, dtype=torch.float64)
    found = relu_mean(*moments)
    if highest < np.inf:
        found = found - relu_mean(moments[0] - highest, moments[1])
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-8)


def test_a_channel_without_deviation_is_a_constant():
    means = torch.tensor([-2.0, 0, 3], dtype=torch.float64)
    assert relu_mean(means, torch.zeros_like(means)).tolist() == [0, 0, 3]


@pytest.mark.parametrize("family", MODELS)
def test_inputs_are_known_behind_batch_norm_and_relu(family):
    model = build(family)
    known = expected_inputs(model)
    assert len(known) == {"resnet": 3, "resnet_bottleneck": 6, "mobilenet_v1": 26}.get(family, 34 + ("stem" in family))
    layers = {module: name for name, (module, _) in select_weights(model).items()}
    for convolution, mean in known.items():
        assert mean.shape == (convolution.in_channels,)
        assert convolution in layers


def test_known_inputs_are_those_that_the_layer_gets():
    """The second convolution of a block sees what the statistics say, but for the normal distribution."""
    model = build("resnet")
    block = model.resnet.encoder.stages[1].layers[1].layer
    seen = []
    block[1].convolution.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].double()))
    with torch.no_grad():
        model(images(1)[0]["pixel_values"])
    measured = seen[0].mean(dim=(0, 2, 3))
    torch.testing.assert_close(expected_inputs(model)[block[1].convolution], measured, rtol=0.3, atol=0.1)


@pytest.mark.parametrize("family", ["resnet", "mobilenet_v1"])
def test_measured_shifts_are_gone_afterwards(family):
    """Every layer whose shift is measured has the float model's mean outputs in front of its norm's subtraction."""
    model, batches = build(family), images()
    selection = select_weights(model)
    expected = expected_outputs(model, selection, batches)
    norms = {name: trace(model, matrix_layers(selection), batches).norm(name) for name in matrix_layers(selection)}
    means = {name: None if norm is None else norm.running_mean.double().clone() for name, norm in norms.items()}
    compress(model)
    shifted = output_means(model, matrix_layers(selection), batches)
    correct_bias(model, selection, expected, batches)
    outputs = output_means(model, matrix_layers(selection), batches)
    measured = [name for name in selection if expected[name].inputs is None]
    assert measured
    for name in measured:
        wanted, found = expected[name].outputs, outputs[name]
        if norms[name] is not None:
            found = found - (norms[name].running_mean.double() - means[name])
        torch.testing.assert_close(found, wanted, rtol=0, atol=2e-5)
        assert (shifted[name] - wanted).abs().max() > 1e-3


def test_shifts_of_known_inputs_are_taken_back_by_the_formula():
    model, batches = build("resnet"), images()
    selection = select_weights(model)
    unit = model.resnet.encoder.stages[0].layers[0].layer[1]
    before, mean = unit.convolution.weight.clone().double(), unit.normalization.running_mean.clone()
    expected = expected_outputs(model, selection, batches)
    compress(model)
    correct_bias(model, selection, expected, batches)
    difference = (unit.convolution.weight.double() - before).sum(dim=(2, 3))
    shift = difference @ expected_inputs(model)[unit.convolution]
    torch.testing.assert_close(unit.normalization.running_mean - mean, shift.float(), rtol=1e-5, atol=1e-6)


def test_equalized_models_are_corrected_by_plain_relu():
    model, batches = build("mobilenet_v2"), images()
    equalize(model)
    selection = select_weights(model)
    expected = expected_outputs(model, selection, batches)
    compress(model, bits=4)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    correct_bias(model, selection, expected, batches)
    assert all(torch.equal(model.get_parameter(name), before[name]) for name in before if name != "classifier.bias")


def test_layers_of_transformers_are_corrected_in_their_biases():
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)).eval()
    model.requires_grad_(False)
    batches = [{"input_ids": torch.randint(32, (3, 9))} for _ in range(2)]
    selection = select_weights(model)
    for module, _ in selection.values():
        module.weight.add_(torch.randn_like(module.weight))
    expected = expected_outputs(model, selection, batches)
    compress(model)
    correct_bias(model, selection, expected, batches)
    outputs = output_means(model, matrix_layers(selection), batches)
    for name in matrix_layers(selection):
        torch.testing.assert_close(outputs[name], expected[name].outputs, rtol=0, atol=1e-5)


def test_a_model_without_biases_and_empty_data_are_refused():
    class Plain(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)

        def forward(self, inputs):
            return self.layer(inputs)

    model, batches = Plain(), [{"inputs": torch.ones(2, 3)}]
    expected = expected_outputs(model, select_weights(model), batches)
    with pytest.raises(ValueError, match="no layer of Plain has a bias; remove 'bias_correction' from refine"):
        correct_bias(model, select_weights(model), expected, batches)
    with pytest.raises(ValueError, match="the calibration data is empty"):
        correct_bias(model, select_weights(model), {}, [])
