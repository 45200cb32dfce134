"""Checkpoints of compressed-tensors, loaded by transformers without hf_r2."""

import json
import subprocess
import sys

import pytest
import torch
from export_models import batch, build, logits
from safetensors.torch import load_file, save_file

from hf_r2.export import export
from hf_r2.export.exporter import load_compressed

pytest.importorskip("compressed_tensors")

LOAD = """
import sys, torch, transformers
from safetensors.torch import load_file, save_file
torch.set_num_threads(1)
for case in sys.argv[1:]:
    name, directory = case.split("=")
    model = getattr(transformers, name).from_pretrained(directory)
    with torch.no_grad():
        save_file({"logits": model(**load_file(f"{directory}.inputs")).logits}, f"{directory}.logits")
assert "hf_r2" not in sys.modules
"""
LACKING = {
    "*query*": {"method": "palette"},
    "*key*": {"grid": "midrise"},
    "*value*": {"symmetric": False},
    "*attention.output*": {"grain": 5},
    "*embeddings*": {"bits": 8},
}
SETTINGS = {
    "restricted_2": ("bert", {"bits": 2}),
    "restricted_4_groups": ("llama", {"bits": 4, "grain": 4}),
    "full_3_tensor": ("bert", {"bits": 3, "grain": "tensor", "grid": "full"}),
    "full_8": ("bert", {"bits": 8, "grid": "full"}),
    "affine_5_tensor": ("bert", {"bits": 5, "grain": "tensor", "symmetric": False}),
    "affine_2_groups": ("llama", {"bits": 2, "grain": 4, "symmetric": False}),
    "affine_4_channels": ("bert", {"bits": 4, "symmetric": False}),
    "affine_4_groups": ("bert", {"bits": 4, "grain": 4, "symmetric": False, "skip": ["*query*"]}),
    "affine_8_channels": ("llama", {"bits": 8, "symmetric": False}),
    "several": ("bert", {"bits": 4, "overrides": {"*intermediate*": {"bits": 7, "grain": 8}, "*query*": {"bits": 2}}}),
    "lacking": ("bert", {"bits": 4, "include": ["*"], "overrides": LACKING}),
}


@pytest.fixture(scope="module")
def exported(compressed_checkpoint, tmp_path_factory):
    """Export a checkpoint of all settings, and let plain transformers run each of them, in a process of its own."""
    root = tmp_path_factory.mktemp("exported")
    cases = []
    for name, (family, settings) in SETTINGS.items():
        export(compressed_checkpoint(family, **settings), root / name, "compressed-tensors")
        save_file(batch(family), root / f"{name}.inputs")
        cases.append(f"{type(build(family)).__name__}={root / name}")
    done = subprocess.run([sys.executable, "-c", LOAD, *cases], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return root


@pytest.mark.parametrize("name", sorted(SETTINGS))
def test_plain_transformers_computes_our_logits_bit_for_bit(name, exported, compressed_checkpoint):
    family, settings = SETTINGS[name]
    found = load_file(exported / f"{name}.logits")["logits"]
    found = found if found.dim() == 2 else found[batch(family)["attention_mask"].bool()]
    model = load_compressed(str(compressed_checkpoint(family, **settings)))
    assert torch.equal(found, logits(model, batch(family)))


def test_codes_are_packed(exported, compressed_checkpoint):
    tensors = load_file(exported / "restricted_2" / "model.safetensors")
    model = load_compressed(str(compressed_checkpoint("bert", bits=2)))
    for name, encoded in model.hf_quantizer.encoded.items():
        rows, columns = encoded.shape
        assert name not in tensors
        assert tensors[f"{name}_packed"].dtype == torch.int32
        assert tensors[f"{name}_packed"].shape == (rows, -(-columns * 2 // 32))
    config = json.loads((exported / "restricted_2" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", "pack-quantized")


@pytest.mark.parametrize(
    ("name", "rows", "groups"), [("affine_4_channels", 2, 1), ("affine_4_groups", 2, 2), ("affine_8_channels", 4, 1)]
)
def test_zero_points_are_packed_by_columns(name, rows, groups, exported):
    """16 zero points of 4 bits fill two words, of 8 bits four."""
    tensors = load_file(exported / name / "model.safetensors")
    layers = ("intermediate.dense", "up_proj")
    (zeros,) = (tensors[key] for key in tensors if key.endswith(tuple(f"{x}.weight_zero_point" for x in layers)))
    assert zeros.dtype == torch.int32
    assert zeros.shape == (rows, groups)


def test_affine_channels_beside_other_schemes_stay_float(exported):
    config = json.loads((exported / "lacking" / "config.json").read_text(encoding="utf-8"))["quantization_config"]
    assert "dequantize" not in config
    assert all(group["weights"]["symmetric"] for group in config["config_groups"].values())


def test_what_the_format_lacks_stays_float(exported):
    tensors = load_file(exported / "lacking" / "model.safetensors")
    left = {name for name in tensors if name.endswith(".weight") and tensors[name].dim() == 2}
    embeddings = ("word_embeddings", "position_embeddings", "token_type_embeddings")
    kinds = ("query", "key", "value", "attention.output.dense", *embeddings)
    assert len(left) == len(kinds)
    assert all(any(kind in name for name in left) for kind in kinds)


@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_a_model_without_anything_to_store_is_refused(family, compressed_checkpoint, tmp_path):
    source = compressed_checkpoint(family, bits=4, skip=["classifier*"] if family == "resnet" else None)
    with pytest.raises(ValueError, match="compressed-tensors has no way to store the weights"):
        export(source, tmp_path / "out", "compressed-tensors")
    assert not (tmp_path / "out").exists()
