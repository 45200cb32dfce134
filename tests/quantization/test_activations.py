"""Checkpoints whose layers quantize their inputs: what is compressed, saved and reloaded is one model."""

import pytest
import torch
from checkpoint_models import build, inputs, load, logits

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.aware.activation_settings import LEARNED
from hf_r2.aware.activations import input_quantizers
from hf_r2.quantization import compress

FAMILIES = ("resnet", "bert", "gpt2")


def config(**activations):
    return R2QuantizationConfig("least_squares", bits=2, activations={"bits": 2, **activations})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_reloaded_model_computes_what_the_compressed_one_did(family, tmp_path):
    model = build(family).eval()
    plain = logits(model, family)
    compress(model, config())
    expected = logits(model, family)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    reloaded = load(family, tmp_path).eval()
    assert torch.equal(logits(reloaded, family), expected)
    assert len(input_quantizers(reloaded)) == len(input_quantizers(model)) > 0


@pytest.mark.parametrize("moving_average", ["eval_only", "train_and_eval"])
def test_averages_are_taken_from_calibration_data_and_reloaded(moving_average, tmp_path):
    build("resnet").save_pretrained(tmp_path / "float")
    quantizer = R2Quantizer.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="needs a calibration_dataset"):
        quantizer.quantize(tmp_path / "low", config(moving_average=moving_average))
    assert not (tmp_path / "low").exists()
    model = quantizer.quantize(
        tmp_path / "low", config(moving_average=moving_average), calibration_dataset=[inputs("resnet")] * 2
    )
    reloaded = load("resnet", tmp_path / "low").eval()
    assert torch.equal(logits(reloaded, "resnet"), logits(model, "resnet"))
    for found, expected in zip(input_quantizers(reloaded), input_quantizers(model), strict=True):
        assert found.batches == 2
        assert torch.equal(found.scales, expected.scales)


STATIC = {"method": "uniform", "bits": 8, "range": "static"}


def test_static_ranges_are_taken_from_calibration_data_and_reloaded(tmp_path):
    build("resnet").save_pretrained(tmp_path / "float")
    quantizer = R2Quantizer.from_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="needs a calibration_dataset"):
        quantizer.quantize(tmp_path / "low", config(**STATIC))
    batches = [inputs("resnet"), {"pixel_values": 2 * inputs("resnet")["pixel_values"]}]
    model = quantizer.quantize(tmp_path / "low", config(**STATIC), calibration_dataset=batches)
    first = model.resnet.embedder.embedder.convolution.input_quantizer
    assert first.low == batches[1]["pixel_values"].min()
    assert first.high == batches[1]["pixel_values"].max()
    reloaded = load("resnet", tmp_path / "low").eval()
    assert torch.equal(logits(reloaded, "resnet"), logits(model, "resnet"))
    assert reloaded.config.quantization_config.activations == STATIC


@pytest.mark.parametrize("settings", [{"bits": 4}, {"bits": 8, "symmetric": True, "grain": "token"}], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_dynamic_ranges_need_no_data(family, settings, tmp_path):
    model = build(family).eval()
    plain = logits(model, family)
    compress(model, config(method="uniform", **settings))
    expected = logits(model, family)
    assert not torch.equal(expected, plain)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(family, tmp_path).eval(), family), expected)


@pytest.mark.parametrize("method", LEARNED)
def test_learned_inputs_are_refused_without_training(method, tmp_path):
    build("resnet").save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=f"'{method}' are learned in training"):
        R2Quantizer.from_pretrained(tmp_path / "float").quantize(tmp_path / "low", config(method=method))
    assert not (tmp_path / "low").exists()


def test_a_float_checkpoint_can_be_compressed_while_loading(tmp_path):
    build("resnet").save_pretrained(tmp_path)
    loaded = load("resnet", tmp_path, quantization_config=config()).eval()
    expected = compress(build("resnet"), config()).eval()
    assert torch.equal(logits(loaded, "resnet"), logits(expected, "resnet"))


def test_skipped_layers_keep_their_inputs():
    model = compress(build("resnet"), config(skip=["classifier*"]))
    assert not hasattr(model.classifier[1], "input_quantizer")
    with pytest.raises(ValueError, match="matches no weight"):
        compress(build("resnet"), config(skip=["clasifier*"]))


def test_a_dequantized_model_is_an_ordinary_float_one():
    model = compress(build("resnet"), config(moving_average="eval_only"))
    model.dequantize()
    assert model.state_dict().keys() == build("resnet").state_dict().keys()


def test_an_embedding_has_no_inputs_to_quantize():
    settings = {"activations": {"bits": 2}, "include": ["*word_embeddings*", "*query*"]}
    with pytest.raises(ValueError, match=r"activations\.skip"):
        compress(build("bert"), R2QuantizationConfig("palette", bits=4, **settings))


def test_a_checkpoint_without_its_averages_is_damaged(tmp_path):
    model = compress(build("resnet"), config(moving_average="eval_only"))
    model.save_pretrained(tmp_path)
    text = (tmp_path / "config.json").read_text().replace('"eval_only"', '"off"')
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="damaged"):
        load("resnet", tmp_path)
