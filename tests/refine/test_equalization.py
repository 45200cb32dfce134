"""Batch-norm folding, cross-layer equalization and high-bias absorption."""

import pytest
import torch
from refine_models import MODELS, build, images, logits
from torch import nn
from transformers import BertConfig, BertModel, MobileNetV1Config, MobileNetV1ForImageClassification

from hf_r2.refine import absorb_bias, batch_norms, equalize, fold_batch_norms
from hf_r2.refine.chains import chains, pairs, replace_relu6
from hf_r2.refine.equalization import input_ranges, output_ranges, pair_scale, segments, triplet_scales

STEPS = {"fold": fold_batch_norms, "equalize": equalize}
SIZES = {
    "resnet": [2, 2, 2],
    "resnet_bottleneck": [3, 3, 3],
    "mobilenet_v1": [27],
    "mobilenet_v2": [3] * 17,
    "mobilenet_v2_stem": [4] + [3] * 16,
}


def reload(model, directory):
    model.save_pretrained(directory)
    return type(model).from_pretrained(directory).eval()


@pytest.mark.parametrize("family", MODELS)
def test_chains_are_those_of_the_architecture(family):
    assert [len(chain) for chain in chains(build(family))] == SIZES[family]


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_the_float_function_stays(family, step):
    """In float32, up to a few times the rounding that the model itself makes through its up to 53 layers."""
    model, exact = build(family), logits(build(family).double())
    before = logits(model)
    assert (before.std(dim=0) > 0.001).all(), "the images are told apart"
    STEPS[step](model)
    noise, left = ((each.double() - exact).abs().max().item() for each in (before, logits(model)))
    assert left <= 1e-5 + 4 * noise


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("step", STEPS)
def test_in_float64_nothing_but_rounding_is_left(family, step):
    model = build(family).double()
    before = logits(model)
    STEPS[step](model)
    torch.testing.assert_close(logits(model), before, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", MODELS)
@pytest.mark.parametrize("step", [*STEPS.values(), absorb_bias])
def test_the_model_saves_and_loads_with_plain_from_pretrained(family, step, tmp_path):
    model = build(family, high_bias=True)
    step(model)
    loaded = reload(model, tmp_path)
    assert all(torch.equal(tensor, loaded.state_dict()[name]) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(logits(loaded), logits(model), rtol=1e-4, atol=1e-5)


def test_folded_norms_have_slope_one_and_true_statistics():
    model = build("resnet")
    norms = {
        name: (module.weight.clone(), module.bias.clone())
        for name, module in model.named_modules()
        if isinstance(module, nn.BatchNorm2d)
    }
    model.resnet.embedder.embedder.normalization.weight[0] = -0.3
    model.resnet.embedder.embedder.normalization.weight[1] = 0
    before = logits(model)
    fold_batch_norms(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-5)
    for name, (weight, bias) in norms.items():
        norm = model.get_submodule(name)
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        torch.testing.assert_close(slope, torch.ones_like(slope), rtol=1e-6, atol=0)
        assert torch.equal(norm.bias, bias)
        if "embedder" not in name:
            torch.testing.assert_close(norm.weight, weight, rtol=1e-5, atol=1e-4)
    convolution = model.resnet.embedder.embedder.convolution
    pixels = images(1, 3)
    outputs = torch.cat([convolution(batch["pixel_values"]) for batch in pixels])
    mean = outputs.mean(dim=(0, 2, 3))
    norm = model.resnet.embedder.embedder.normalization
    torch.testing.assert_close(mean, norm.running_mean, rtol=1e-3, atol=1e-4)
    deviation = torch.stack([convolution(batch["pixel_values"]).var(dim=(0, 2, 3)) for batch in pixels]).mean(dim=0)
    torch.testing.assert_close(deviation[2:].sqrt(), norm.weight[2:], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("family", MODELS)
def test_neighbours_have_equal_ranges(family):
    model = build(family)
    equalize(model)
    for unit, following in pairs(chains(model)):
        first = output_ranges(unit.convolution.weight)
        second = input_ranges(following.convolution.weight, following.convolution.groups)
        torch.testing.assert_close(first, second, rtol=0.02, atol=1e-6)


def test_a_pair_shares_the_root_of_the_product():
    first, second = torch.tensor([4.0, 1, 0, 3]), torch.tensor([1.0, 9, 5, 0])
    scale = pair_scale(first, second)
    assert scale.tolist() == pytest.approx([2, 1 / 3, 1, 1])
    shared = (first * second).sqrt()[:2]
    torch.testing.assert_close((first / scale)[:2], shared)
    torch.testing.assert_close((second * scale)[:2], shared)


def test_a_triplet_shares_the_cube_root_of_the_product():
    first, middle, last = (torch.rand(5, dtype=torch.float64) + 0.1 for _ in range(3))
    last[4] = 0
    one, two = triplet_scales(first, middle, last)
    shared = (first * middle * last).pow(1 / 3)[:4]
    for scaled in (first / one, middle * one / two, last * two):
        torch.testing.assert_close(scaled[:4], shared)
    assert one[4] == two[4] == 1


def test_depthwise_convolutions_are_in_the_middle_of_triplets():
    lengths = [len(segment) for segment in segments(chains(build("mobilenet_v1"))[0])]
    assert lengths == [3] * 13
    assert [len(segment) for segment in segments(chains(build("mobilenet_v2_stem"))[0])] == [2, 3]


def test_relu6_becomes_relu_in_the_model_and_in_its_config(tmp_path):
    model = build("mobilenet_v2")
    assert any(isinstance(module, nn.ReLU6) for module in model.modules())
    equalize(model)
    loaded = reload(model, tmp_path)
    assert loaded.config.hidden_act == "relu"
    for each in (model, loaded):
        assert not any(isinstance(module, nn.ReLU6) for module in each.modules())


def test_relu6_that_the_config_does_not_name_is_refused():
    model = build("mobilenet_v1")
    model.config.hidden_act = "gelu"
    with pytest.raises(ValueError, match="does not name in hidden_act"):
        replace_relu6(model)


@pytest.mark.parametrize("step", [equalize, absorb_bias])
def test_other_architectures_and_activations_are_refused(step):
    bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8))
    with pytest.raises(ValueError, match=r"BertModel has no layers that are known to scale.* MobileNetV2; remove it"):
        step(bert)
    config = MobileNetV1Config(depth_multiplier=0.0625, min_depth=4, hidden_act="gelu")
    with pytest.raises(ValueError, match="needs ReLU between layers, not GELU"):
        step(MobileNetV1ForImageClassification(config))


# --- high-bias absorption ---------------------------------------------------------------------------------------------


def test_absorbed_biases_leave_the_function_where_activations_exceed_them():
    """Without padding, and with all activations above what is absorbed, the change is exact."""
    model = build("resnet_bottleneck").double()
    block = chains(model)[0]
    for unit in block:
        unit.convolution.padding = (0, 0)
        unit.normalization.bias.fill_(3)
        unit.normalization.weight.fill_(0.2)  # c = 3 − 3 · 0.2
        unit.normalization.running_var.fill_(1e4)
    pixels = torch.randn(2, 8, 9, 9, dtype=torch.float64)
    lowest = []
    for unit in block[:-1]:
        unit.normalization.register_forward_hook(lambda *arguments: lowest.append(arguments[2].min().item()))
    before = nn.Sequential(*block)(pixels)
    assert min(lowest) > 2.4
    absorb_bias(model)
    torch.testing.assert_close(nn.Sequential(*block)(pixels), before, rtol=1e-9, atol=1e-9)
    biases = [unit.normalization.bias for unit in block]
    expected = [torch.full_like(bias, value) for bias, value in zip(biases, [0.6, 0.6, 3], strict=True)]
    torch.testing.assert_close(biases, expected)


@pytest.mark.parametrize("family", MODELS)
def test_absorption_shrinks_activations_and_hardly_changes_the_outputs(family):
    model = build(family, high_bias=True)
    equalize(model)
    before, biases = logits(model), sum(norm.bias.relu().sum() for norm in batch_norms(model))
    absorb_bias(model)
    assert sum(norm.bias.relu().sum() for norm in batch_norms(model)) < biases
    assert torch.isfinite(logits(model)).all()
    assert logits(model).shape == before.shape


def test_low_biases_are_left():
    model = build("resnet")
    for norm in batch_norms(model):
        norm.bias.copy_(3 * norm.weight.abs())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    absorb_bias(model)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=1e-6)
