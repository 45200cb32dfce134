"""Palettes of vectors, as the first hf_r2 that had them wrote them, keep loading as they did."""

import json

import make_v1_vectors
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

VECTORS = make_v1_vectors.DIRECTORY


@pytest.fixture(scope="module")
def expected():
    return load_file(VECTORS / "expected.safetensors")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(VECTORS)


def test_vectors_load_bit_equal(model, expected):
    state = model.state_dict()
    assert torch.equal(state.pop("lm_head.weight"), expected["transformer.wte.weight"])
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        assert tensor.dtype == expected[name].dtype, name
        assert torch.equal(tensor, expected[name]), name


def test_vectors_are_saved_again_as_identical_bytes(model, tmp_path):
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == (VECTORS / "model.safetensors").read_bytes()
    configs = [json.loads((directory / "config.json").read_text()) for directory in (tmp_path, VECTORS)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


def test_the_checkpoint_has_every_kind_of_group_and_stays_small(model):
    config = json.loads((VECTORS / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 1
    settings = {name: encoded.settings for name, encoded in model.hf_quantizer.encoded.items()}
    assert "transformer.wte.weight" in settings
    assert {entry.bits for entry in settings.values()} == {1, 2, 3, 4, 8}
    assert {entry.cluster_dim for entry in settings.values()} == {1, 2, 3, 4, 5, 7, 64}
    assert {entry.grain for entry in settings.values()} == {"tensor", "channel", 5, 8}
    assert sum(file.stat().st_size for file in VECTORS.iterdir()) < 60_000


def test_vectors_decode_by_hand(model, expected):
    tensors = {name: tensor.numpy() for name, tensor in load_file(VECTORS / "model.safetensors").items()}
    for name, encoded in model.hf_quantizer.encoded.items():
        weight = decode_by_hand(tensors[name], tensors[f"{name}_lut"], encoded.shape, encoded.settings)
        stored = weight if "wte" in name else weight.T
        np.testing.assert_array_equal(stored, expected[name].numpy(), err_msg=name)


def decode_by_hand(packed, lut, shape, settings):
    """Element by element and bit by bit, as the page of the format says it."""
    outputs, inputs = shape
    weight = np.empty((outputs, inputs), dtype=np.float32)
    stream = np.unpackbits(packed, bitorder="little").tolist()
    if settings.cluster_dim == 1:
        for row in range(outputs):
            for column in range(inputs):
                weight[row, column] = lut[0, take_code(stream, settings.bits)]
        return weight
    for group, places in enumerate(groups_by_hand(outputs, inputs, settings.grain)):
        for start in range(0, len(places), settings.cluster_dim):
            code = take_code(stream, settings.bits)
            for offset, place in enumerate(places[start : start + settings.cluster_dim]):
                weight[place] = lut[group, code, offset]
    assert not any(stream)
    assert len(stream) < 8
    return weight


def take_code(stream, bits):
    code = sum(bit << power for power, bit in enumerate(stream[:bits]))
    del stream[:bits]
    return code


def groups_by_hand(outputs, inputs, grain):
    """Places of the elements of every group, in the order in which the codebooks are listed."""
    if grain == "tensor":
        return [[(row, column) for row in range(outputs) for column in range(inputs)]]
    size = inputs if grain == "channel" else grain
    rows = range(outputs)
    full = [
        [(row, column) for column in range(start, start + size)]
        for row in rows
        for start in range(0, inputs - size + 1, size)
    ]
    rest = [[(row, column) for column in range(inputs - inputs % size, inputs)] for row in rows if inputs % size]
    return full + rest


def test_a_golden_checkpoint_is_never_made_again(tmp_path):
    make_v1_vectors.main(tmp_path / "new")
    content = (tmp_path / "new/model.safetensors").read_bytes()
    with pytest.raises(SystemExit, match="never made again"):
        make_v1_vectors.main(tmp_path / "new")
    assert (tmp_path / "new/model.safetensors").read_bytes() == content
