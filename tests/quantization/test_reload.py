"""Compressed checkpoints in processes of their own: with hf_r2 bit-equal, without it never a model."""

import json

import pytest
import torch
from checkpoint_models import CODECS, FAMILIES, GRAINS, inputs, load, logits, mixed, run_python, selected
from safetensors.torch import load_file, save_file

TIED = {"method": "palette", "bits": 2, "include": ["*"]}
TIED_VECTORS = {**TIED, "bits": 4, "grain": "tensor", "cluster_dim": 3}

# For each directory: reads the inputs beside it, writes the logits and the selected weights beside it
WITH_HF_R2 = """
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

import hf_r2

torch.set_num_threads(1)
for directory in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(directory)
    model = getattr(transformers, config.architectures[0]).from_pretrained(directory)
    with torch.no_grad():
        logits = model(**load_file(directory + ".inputs")).logits
    weights = {name: module.weight.detach().contiguous() for name, (module, _) in hf_r2.select_weights(model).items()}
    save_file({"logits": logits, **weights}, directory + ".outputs")
"""

# For each directory: the name of the exception that loading it raises, or None, and the logits of what it loaded
WITHOUT_HF_R2 = """
import json
import sys

import torch
import transformers
from safetensors.torch import load_file, save_file

torch.set_num_threads(1)
errors = {}
for directory in sys.argv[1:]:
    config = transformers.AutoConfig.from_pretrained(directory)
    errors[directory] = None
    try:
        model = getattr(transformers, config.architectures[0]).from_pretrained(directory)
        with torch.no_grad():
            save_file({"logits": model(**load_file(directory + ".inputs")).logits}, directory + ".outputs")
    except Exception as error:
        errors[directory] = type(error).__name__
assert "hf_r2" not in sys.modules
print(json.dumps(errors))
"""


def beside(directory, suffix):
    return directory.with_name(f"{directory.name}.{suffix}")


@pytest.fixture(scope="module")
def checkpoints(compressed_checkpoint):
    """Family and directory of a checkpoint of every architecture, all codecs in it, and of some with tied codes."""
    found = [(family, compressed_checkpoint(family, **mixed(family))) for family in FAMILIES]
    found += [("gpt2", compressed_checkpoint("gpt2", **settings)) for settings in (TIED, TIED_VECTORS)]
    for family, directory in found:
        save_file(inputs(family), beside(directory, "inputs"))
    return found


@pytest.fixture(scope="module")
def outputs(checkpoints):
    """What a fresh process computes, by directory."""
    run_python(WITH_HF_R2, *(directory for _, directory in checkpoints))
    return {directory: load_file(beside(directory, "outputs")) for _, directory in checkpoints}


@pytest.mark.parametrize("index", range(len(FAMILIES) + 2), ids=[*FAMILIES, "gpt2-tied", "gpt2-vectors"])
def test_a_fresh_process_computes_bit_equal_logits(index, checkpoints, outputs):
    family, directory = checkpoints[index]
    model = load(family, directory)
    computed = outputs[directory]
    assert torch.equal(computed.pop("logits"), logits(model, family))
    assert computed.keys() == selected(model).keys()
    assert all(torch.equal(weight, model.get_parameter(name)) for name, weight in computed.items())


@pytest.fixture(scope="module")
def loaded_without_hf_r2(checkpoints, compressed_checkpoint, tmp_path_factory):
    """Name of the exception by directory, and the directory of a dequantized checkpoint with its logits."""
    directories = [directory for _, directory in checkpoints]
    directories += [
        compressed_checkpoint("resnet", **codec, grain=grain) for codec in CODECS.values() for grain in GRAINS
    ]
    directories += [
        compressed_checkpoint("resnet", method="palette", bits=bits, grain="tensor") for bits in range(1, 9)
    ]
    sharded = tmp_path_factory.mktemp("sharded")
    load("resnet", directories[-1]).save_pretrained(sharded, max_shard_size=400)
    directories.append(sharded)
    dequantized = tmp_path_factory.mktemp("dequantized") / "resnet"
    model = load("resnet", directories[-1]).dequantize()
    model.save_pretrained(dequantized)
    save_file(inputs("resnet"), beside(dequantized, "inputs"))
    errors = json.loads(run_python(WITHOUT_HF_R2, *directories, dequantized).splitlines()[-1])
    return errors, directories, dequantized, logits(model, "resnet")


def test_without_hf_r2_no_compressed_checkpoint_loads(loaded_without_hf_r2):
    errors, directories, _, _ = loaded_without_hf_r2
    assert len(directories) > 30
    assert {errors[str(directory)] for directory in directories} == {"RuntimeError"}


def test_without_hf_r2_a_dequantized_checkpoint_loads_and_computes_the_same(loaded_without_hf_r2):
    errors, _, dequantized, expected = loaded_without_hf_r2
    assert errors[str(dequantized)] is None
    assert torch.equal(load_file(beside(dequantized, "outputs"))["logits"], expected)


def test_importing_hf_r2_registers_its_method_with_transformers():
    code = """
import transformers.quantizers.auto as auto
assert "hf_r2" not in auto.AUTO_QUANTIZER_MAPPING
import hf_r2
assert auto.AUTO_QUANTIZATION_CONFIG_MAPPING["hf_r2"] is hf_r2.R2QuantizationConfig
assert "hf_r2" in auto.AUTO_QUANTIZER_MAPPING
"""
    run_python(code)
