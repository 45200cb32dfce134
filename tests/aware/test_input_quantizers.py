import copy

import pytest
import torch
from torch import nn

from hf_r2.aware import ActivationSettings
from hf_r2.aware.activation_settings import ACTIVATION_METHODS, LEARNED
from hf_r2.aware.activations import (
    INPUT_QUANTIZERS,
    activate_inputs,
    input_quantizers,
    observe_inputs,
    quantize_inputs,
    release_inputs,
)
from hf_r2.aware.binary_activations import BinaryInputs, binary, measured
from hf_r2.codecs.binary_bases import solve

SETTINGS = {
    "1 bit": {"bits": 1},
    "2 bits": {"bits": 2},
    "ternary": {"bits": 2, "basis": "ternary"},
    "greedy": {"bits": 3},
    "paper": {"bits": 2, "centred": False},
}


def sample(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def quantizer(by_token=False, **settings):
    made = BinaryInputs(ActivationSettings(**settings), by_token)
    made.active = True
    return made


def reference(row, settings):
    """Quantize one group element by element, in float64, with the derivative of every element."""
    mean = row.mean() if settings.centred else torch.zeros((), dtype=row.dtype)
    deviation = (row - mean).square().mean().sqrt() + 1e-12
    units = (row - mean) / deviation
    scales = solve(units.clamp(-settings.clip, settings.clip)[None].float(), settings.bits, settings.basis)[0].double()
    values, slopes = [], []
    for unit in units:
        value, slope, slope_of_rest, rest = 0.0, 0.0, float(abs(unit) <= settings.clip), float(unit)
        for scale in scales.tolist():
            sign = 1.0 if rest >= 0 else -1.0
            through = scale * slope_of_rest * (abs(rest) <= 1)
            value, slope = value + scale * sign, slope + through
            rest, slope_of_rest = rest - scale * sign, slope_of_rest - through
        values.append(mean + deviation * value)
        slopes.append(slope)
    return torch.stack(values), torch.tensor(slopes, dtype=torch.float64)


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_values_and_gradients_are_those_of_the_formula(settings):
    step = quantizer(**settings)
    inputs = (0.5 + 2 * sample(3, 40)).requires_grad_()
    upstream = sample(3, 40, seed=1)
    result = step(inputs)
    (result * upstream).sum().backward()
    for row, value, grad, weight in zip(inputs.detach(), result, inputs.grad, upstream, strict=True):
        expected, slopes = reference(row.double(), step.settings)
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad.double(), slopes * weight.double(), rtol=1e-5, atol=1e-5)


def test_levels_are_as_many_as_the_bits_say():
    for bits in (1, 2, 3):
        (row,) = quantizer(bits=bits)(sample(1, 4000))
        assert len(row.unique()) <= 2**bits


def test_one_bit_keeps_something_of_inputs_without_negative_values_only_if_they_are_centred():
    inputs = sample(4, 50).relu()
    assert all(len(row.unique()) == 2 for row in quantizer(bits=1)(inputs))
    assert all(len(row.unique()) == 1 for row in quantizer(bits=1, centred=False)(inputs))


def test_no_example_and_no_token_depends_on_another():
    images, tokens = sample(3, 2, 4, 4), sample(3, 5, 6)
    for step, inputs in ((quantizer(), images), (quantizer(by_token=True), tokens)):
        assert torch.equal(step(inputs)[1:2], step(inputs[1:2]))
    assert torch.equal(quantizer(by_token=True)(tokens)[:, :3], quantizer(by_token=True)(tokens[:, :3]))


def test_a_constant_input_stays():
    torch.testing.assert_close(quantizer()(torch.full((2, 9), 3.0)), torch.full((2, 9), 3.0))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_quantized_in_float32(dtype):
    inputs = 100 * sample(2, 2000).to(dtype)
    expected = quantizer()(inputs.float())
    assert torch.equal(quantizer()(inputs), expected.to(dtype))


def test_an_empty_batch_passes():
    assert quantizer()(torch.zeros(0, 5)).shape == (0, 5)


def test_running_averages_start_with_the_mean_of_the_batches_and_then_move():
    step = quantizer(moving_average="eval_only", momentum=0.5).train()
    batches = [sample(4, 30, seed=seed) for seed in range(4)]
    found = [measured(batch, step.settings)[2].mean(dim=0) for batch in batches]
    for batch in batches:
        step(batch)
    expected = (found[0] + found[1]) / 2
    for new in found[2:]:
        expected = (expected + new) / 2
    torch.testing.assert_close(step.scales, expected)


def test_averages_count_in_evaluation_or_in_training_too():
    inputs = sample(4, 30)
    for moving, changed in (("off", (False, False)), ("eval_only", (False, True)), ("train_and_eval", (True, True))):
        step = quantizer(moving_average=moving).train()
        step(sample(4, 30, seed=1))
        alone = binary(inputs, *measured(inputs, step.settings), step.settings.clip)
        for training, differs in zip((True, False), changed, strict=True):
            assert torch.equal(step.train(training)(inputs), alone) != differs


def test_evaluation_without_any_average_says_what_to_do():
    with pytest.raises(ValueError, match="calibration_dataset"):
        quantizer(moving_average="eval_only").eval()(sample(2, 5))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


def quantized(**settings):
    model = network()
    quantize_inputs({"0.weight": model[0], "3.weight": model[3]}, ActivationSettings(**settings))
    return model


def test_quantizers_act_on_the_inputs_of_layers_once_they_are_activated():
    model, images = quantized(bits=2), sample(2, 2, 4, 4)
    assert torch.equal(model(images), network()(images))
    activate_inputs(model)
    plain = network()
    hidden = plain[2](plain[1](plain[0](quantizer()(images))))
    assert torch.equal(model(images), plain[3](quantizer(by_token=True)(hidden)))
    release_inputs(model)
    assert not input_quantizers(model)
    assert torch.equal(model(images), network()(images))


def test_averages_are_saved_and_a_copy_has_its_own():
    model = quantized(moving_average="eval_only")
    activate_inputs(model)
    model.train()(sample(2, 2, 4, 4))
    other = quantized(moving_average="eval_only")
    activate_inputs(other)
    other.load_state_dict(model.state_dict())
    twin = copy.deepcopy(model)
    images = sample(2, 2, 4, 4, seed=3)
    assert torch.equal(other.eval()(images), model.eval()(images))
    twin.train()(10 * images)
    assert torch.equal(other(images), model(images))
    release_inputs(twin)
    assert input_quantizers(model)


class Takes(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = quantized(moving_average="eval_only")

    def forward(self, images):
        return self.layers(images)


def test_calibration_averages_all_batches_alike():
    model, batches = Takes(), [sample(2, 2, 4, 4, seed=seed) for seed in range(3)]
    activate_inputs(model)
    model.train()(100 * batches[0])
    observe_inputs(model, ({"images": batch} for batch in batches))
    first = input_quantizers(model)[0]
    found = [measured(batch.flatten(1), first.settings)[1].mean() for batch in batches]
    torch.testing.assert_close(first.deviation, torch.stack(found).mean())
    assert first.batches == 3
    before = first.deviation.clone()
    model(batches[0])
    assert torch.equal(first.deviation, before)


def test_calibration_without_data_says_so():
    with pytest.raises(ValueError, match="calibration data"):
        observe_inputs(Takes(), [])


def test_an_embedding_is_refused():
    with pytest.raises(ValueError, match=r"embed\.weight \(Embedding\)"):
        quantize_inputs({"embed.weight": nn.Embedding(3, 4)}, ActivationSettings())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits=0"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 3, "basis": "ternary"}, "ternary"),
        ({"bits": 3, "basis": "optimal"}, "greedy"),
        ({"basis": "best"}, "best"),
        ({"clip": 0.0}, "clip"),
        ({"moving_average": "on"}, "moving_average"),
        ({"momentum": 1.0}, "momentum"),
        ({"centred": "yes"}, "centred"),
        ({"skip": "a*"}, "list of patterns"),
        ({"method": "uniforn"}, "unknown activations method 'uniforn': use one of least_squares, uniform"),
        ({"method": "uniform", "bits": 1}, "bits=1 .* from 2 to 8 .* method='least_squares' goes down to 1"),
        ({"method": "lsq", "bits": 2.5}, r"bits=2\.5"),
        ({"method": "uniform", "range": "fixed"}, "range='fixed' .* dynamic, static"),
        ({"method": "uniform", "grain": "channel"}, "grain='channel' .* tensor, token"),
        ({"method": "uniform", "symmetric": "yes"}, "symmetric='yes'"),
        ({"method": "uniform", "range": "static", "grain": "token"}, "one for all tokens"),
        ({"method": "uniform", "centred": False}, "'centred' of activations is an option of least_squares"),
        ({"method": "uniform", "moving_average": "eval_only"}, "'moving_average' .* remove it for 'uniform'"),
        ({"method": "lsq", "range": "static"}, "'range' of activations is an option of uniform"),
        ({"symmetric": True}, "'symmetric' .* remove it for 'least_squares'"),
        ({"method": "ewgs", "delta": -1.0}, "delta"),
        ({"method": "pact", "delta": 0.5}, "'delta' of activations is an option of ewgs"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        ActivationSettings(**settings)


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 3},
        {"bits": 2, "moving_average": "eval_only", "skip": ["a*"]},
        {"method": "uniform", "bits": 4},
        {"method": "uniform", "bits": 4, "range": "static", "symmetric": True, "momentum": 0.5},
        {"method": "uniform", "bits": 4, "grain": "token"},
        {"method": "lsq", "bits": 2},
        {"method": "ewgs", "bits": 2, "delta": 0.0, "skip": ["a*"]},
    ],
    ids=str,
)
def test_settings_are_written_without_their_defaults_and_read_back(settings):
    made = ActivationSettings(**settings)
    assert made.to_dict() == settings
    assert ActivationSettings(**made.to_dict()) == made


@pytest.mark.parametrize("method", ACTIVATION_METHODS)
def test_every_method_has_a_quantizer_whose_levels_are_as_many_as_its_bits_say(method):
    for bits in (2, 4):
        step = INPUT_QUANTIZERS[method](ActivationSettings(bits, method), by_token=False).train()
        step.active = True
        (row,) = step(sample(1, 4000))
        assert 2 ** (bits - 1) < len(row.unique()) <= 2**bits
        assert bool(list(step.parameters())) == (method in LEARNED)


@pytest.mark.parametrize("method", ACTIVATION_METHODS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_method_keeps_dtypes_and_computes_in_float32(method, dtype):
    first, second = (INPUT_QUANTIZERS[method](ActivationSettings(2, method), by_token=False) for _ in range(2))
    inputs = sample(2, 200).to(dtype)
    for step in (first, second):
        step.train().active = True
    assert torch.equal(first(inputs), second(inputs.float()).to(dtype))
    assert first(inputs[:0]).shape == (0, 200)
