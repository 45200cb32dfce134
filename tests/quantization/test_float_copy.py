import pytest
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.quantization.float_copy import dequantize


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float-copy")
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(folder / "toy")
    ViTImageProcessor().save_pretrained(folder / "toy")
    settings = R2QuantizationConfig("palette", bits=2, grain="tensor")
    R2Quantizer.from_pretrained(folder / "toy").quantize(folder / "toy-2bit", settings)
    dequantize(folder / "toy-2bit", folder / "toy-decoded")
    return folder


def test_the_copy_is_an_ordinary_checkpoint_of_the_same_weights(folders):
    compressed, copy = (
        AutoModelForImageClassification.from_pretrained(folders / name) for name in ("toy-2bit", "toy-decoded")
    )
    assert not hasattr(copy.config, "quantization_config")
    assert getattr(copy, "hf_quantizer", None) is None
    weights = compressed.state_dict()
    assert weights.keys() == copy.state_dict().keys()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in copy.state_dict().items())
    AutoImageProcessor.from_pretrained(folders / "toy-decoded")


def test_the_copy_can_be_compressed_again_without_loss(folders, tmp_path):
    settings = R2QuantizationConfig("palette", bits=2, grain="tensor")
    again = R2Quantizer.from_pretrained(folders / "toy-decoded").quantize(tmp_path / "again", settings)
    compressed = AutoModelForImageClassification.from_pretrained(folders / "toy-2bit")
    for name, tensor in compressed.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], tensor)


def test_a_float_checkpoint_is_refused_and_nothing_is_written(folders, tmp_path):
    with pytest.raises(ValueError, match="is not compressed by hf_r2"):
        dequantize(folders / "toy", tmp_path / "out")
    assert not (tmp_path / "out").exists()
