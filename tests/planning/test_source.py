"""What a plan starts from: float weights one at a time, and sizes that are those of the files."""

import itertools

import pytest
import torch
from planning_models import MODELS, save

from hf_r2 import R2QuantizationConfig, R2Quantizer, select_weights
from hf_r2.codecs import CodecSettings
from hf_r2.files import weight_file_bytes
from hf_r2.planning.source import FloatCheckpoint
from hf_r2.quantization.quantizer import load_float_model
from hf_r2.selection import output_first

SETTINGS = [
    CodecSettings("palette", 3, "tensor"),
    CodecSettings("uniform", 5, "channel"),
    CodecSettings("least_squares", 2, 8),
]


def mixed(names):
    return dict(zip(names, itertools.cycle(SETTINGS), strict=False))


def written(source, target, settings, include):
    overrides = {name: own.to_dict() for name, own in settings.items()}
    R2Quantizer.from_pretrained(source).quantize(target, R2QuantizationConfig(overrides=overrides, include=include))
    return weight_file_bytes(target)


@pytest.mark.parametrize("include", [None, ["*"]], ids=str)
@pytest.mark.parametrize("name", sorted(MODELS))
def test_weights_are_those_of_the_model(name, include, tmp_path):
    source = save(name, tmp_path / "float")
    checkpoint = FloatCheckpoint(source, include, None)
    selected = select_weights(load_float_model(source), include)
    assert list(checkpoint.weights) == list(selected)
    for key, (module, attribute) in selected.items():
        expected = output_first(module, getattr(module, attribute))
        assert torch.equal(checkpoint.weights[key].read(), expected)
        assert (checkpoint.weights[key].shape, checkpoint.weights[key].dtype) == (expected.shape, expected.dtype)
    assert checkpoint.numel == sum(module.weight.numel() for module, _ in selected.values())


@pytest.mark.parametrize("include", [None, ["*"]], ids=str)
@pytest.mark.parametrize("name", sorted(MODELS.keys() - {"vit"}))
def test_file_bytes_are_those_of_the_file(name, include, tmp_path):
    source = save(name, tmp_path / "float")
    checkpoint = FloatCheckpoint(source, include, None)
    settings = mixed(checkpoint.weights)
    assert checkpoint.file_bytes(settings) == written(source, tmp_path / "out", settings, include)
    assert checkpoint.file_bytes({}) == weight_file_bytes(source)


def test_file_bytes_are_those_of_all_shards(tmp_path):
    source = save("gpt2", tmp_path / "float", max_shard_size=4000)
    checkpoint = FloatCheckpoint(source, ["*"], None)
    settings = mixed(checkpoint.weights)
    assert len(list((tmp_path / "float").glob("*.safetensors"))) > 2
    assert checkpoint.file_bytes(settings) == written(source, tmp_path / "out", settings, ["*"])


def test_where_files_name_tensors_otherwise_sizes_are_not_below_the_files(tmp_path):
    source = save("vit", tmp_path / "float")
    checkpoint = FloatCheckpoint(source, None, None)
    settings = mixed(checkpoint.weights)
    size = written(source, tmp_path / "out", settings, None)
    assert size <= checkpoint.file_bytes(settings) <= size + 60 * len(load_float_model(source).state_dict())


def test_a_weight_knows_its_bytes(tmp_path):
    checkpoint = FloatCheckpoint(save("resnet", tmp_path / "float"), None, None)
    # 3 × 16 codes of 4 bits, and one float32 scale for each of 3 channels
    assert checkpoint.weights["classifier.1.weight"].nbytes(CodecSettings("uniform", 4, "channel")) == 24 + 12
