"""Least-squares binary weights, as the first hf_r2 that had them wrote them, keep loading as they did."""

import json

import make_v1_least_squares
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from test_golden import group_by_hand
from transformers import AutoModelForImageClassification

LEAST_SQUARES = make_v1_least_squares.DIRECTORY


@pytest.fixture(scope="module")
def expected():
    return load_file(LEAST_SQUARES / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageClassification.from_pretrained(LEAST_SQUARES)


def test_binary_weights_load_bit_equal(model, expected):
    state = model.state_dict()
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_binary_weights_are_saved_again_as_identical_bytes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (LEAST_SQUARES / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (tmp_path, LEAST_SQUARES)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_checkpoint_has_every_kind_of_basis_and_stays_small(model):
    config = json.loads((LEAST_SQUARES / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    settings = [encoded.settings for encoded in model.hf_quantizer.encoded.values()]
    assert {entry.bits for entry in settings} == {1, 2, 3, 4, 8}
    assert {entry.basis for entry in settings} == {"optimal", "greedy", "ternary"}
    assert {entry.grain for entry in settings} == {"tensor", "channel", 10}
    assert sum(file.stat().st_size for file in LEAST_SQUARES.iterdir()) < 60_000


def test_binary_weights_decode_by_hand(model, expected):
    tensors = {name: tensor.numpy() for name, tensor in load_file(LEAST_SQUARES / "model.safetensors").items()}
    for name, encoded in model.hf_quantizer.encoded.items():
        weight = decode_by_hand(tensors[name], tensors[f"{name}_basis"], encoded.shape, encoded.settings)
        np.testing.assert_array_equal(weight, expected[name].numpy(), err_msg=name)


def decode_by_hand(packed, basis, shape, settings):
    """Element by element and sign by sign, as the page of the format says it."""
    bits, outputs, inputs = settings.bits, shape[0], int(np.prod(shape[1:]))
    stream = np.unpackbits(packed, bitorder="little")
    weight = np.zeros((outputs, inputs), dtype=np.float32)
    for row in range(outputs):
        for column in range(inputs):
            group = group_by_hand(row, column, outputs, inputs, settings.grain)
            first = (row * inputs + column) * bits
            for scale, bit in zip(basis[group], stream[first : first + bits], strict=True):
                weight[row, column] += scale if bit else -scale
    return weight.reshape(shape)


def test_a_golden_checkpoint_is_never_made_again(tmp_path):
    make_v1_least_squares.main(tmp_path / "new")
    content = (tmp_path / "new/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="never made again"):
        make_v1_least_squares.main(tmp_path / "new")
    assert (tmp_path / "new/model.safetensors").read_bytes() == content
