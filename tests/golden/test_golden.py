"""Every format version ever released keeps loading as it did."""

import json

import make_v1
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification

V1 = make_v1.DIRECTORY


@pytest.fixture(scope="module")
def expected():
    return load_file(V1 / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageClassification.from_pretrained(V1)


def test_version_1_loads_bit_equal(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_version_1_is_saved_again_as_identical_bytes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (V1 / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (tmp_path, V1)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_version_1_has_every_kind_of_codebook_and_stays_small(model):
    config = json.loads((V1 / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    settings = [encoded.settings for encoded in model.hf_quantizer.encoded.values()]
    assert {entry.bits for entry in settings} == {1, 2, 3, 4, 8}
    assert {entry.grid for entry in settings} == {"restricted", "full", "midrise", None}
    assert {entry.grain for entry in settings} == {"tensor", "channel", 10}
    assert {(entry.method, entry.symmetric) for entry in settings} == {
        ("uniform", True),
        ("uniform", False),
        ("palette", None),
    }
    assert sum(file.stat().st_size for file in V1.iterdir()) < 60_000


def test_version_1_decodes_by_hand(model, expected):
    tensors = {name: tensor.numpy() for name, tensor in load_file(V1 / "model.safetensors").items()}
    for name, encoded in model.hf_quantizer.encoded.items():
        codebook = {key: tensors[f"{name}_{key}"] for key in ("scale", "zero", "lut") if f"{name}_{key}" in tensors}
        shape = expected[name].shape
        weight = decode_by_hand(tensors[name], codebook, shape, encoded.settings)
        np.testing.assert_array_equal(weight, expected[name].numpy(), err_msg=name)


def decode_by_hand(packed, codebook, shape, settings):
    """Element by element, as the page of the format says it."""
    bits, outputs, inputs = settings.bits, shape[0], int(np.prod(shape[1:]))
    stream = np.unpackbits(packed, bitorder="little")
    weight = np.empty((outputs, inputs), dtype=np.float32)
    for row in range(outputs):
        for column in range(inputs):
            first = (row * inputs + column) * bits
            code = sum(int(bit) << power for power, bit in enumerate(stream[first : first + bits]))
            group = group_by_hand(row, column, outputs, inputs, settings.grain)
            if settings.method == "palette":
                weight[row, column] = codebook["lut"][group, code]
                continue
            half = 2 ** (bits - 1)
            offset = codebook["zero"][group] if "zero" in codebook else half - 0.5 * (settings.grid == "midrise")
            weight[row, column] = np.float32(code - np.float32(offset)) * codebook["scale"][group]
    return weight.reshape(shape)


def group_by_hand(row, column, outputs, inputs, grain):
    """All whole groups of every channel come first, then the shorter last ones."""
    if grain == "tensor":
        return 0
    if grain == "channel":
        return row
    whole = inputs // grain
    if column < whole * grain:
        return row * whole + column // grain
    return outputs * whole + row


def test_a_golden_checkpoint_is_never_made_again(tmp_path):
    make_v1.main(tmp_path / "new")
    assert {"config.json", "expected.safetensors", "model.safetensors"} <= {
        f.name for f in (tmp_path / "new").iterdir()
    }
    content = (tmp_path / "new/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="never made again"):
        make_v1.main(tmp_path / "new")
    assert (tmp_path / "new/model.safetensors").read_bytes() == content
