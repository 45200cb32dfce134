"""Statistics from the files alone: those of the model in memory, for float and for compressed checkpoints."""

import json
from shutil import copytree

import matplotlib.image
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)
from typer.testing import CliRunner

from hf_r2 import R2QuantizationConfig, R2Quantizer, weight_statistics
from hf_r2.cli import app
from hf_r2.report.inspection import inspect_checkpoint
from hf_r2.selection import select_weights

run = CliRunner().invoke


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=1, n_head=2))


@pytest.fixture(scope="module")
def floats(model, tmp_path_factory):
    path = tmp_path_factory.mktemp("inspect") / "float"
    model.save_pretrained(path, max_shard_size=1000)
    return path


@pytest.fixture(scope="module")
def compressed(floats):
    settings = R2QuantizationConfig("palette", bits=2, include=["*"], overrides={"*wte*": {"bits": 4}})
    model = AutoModelForCausalLM.from_pretrained(floats, quantization_config=settings)
    model.save_pretrained(floats.with_name("compressed"))
    return floats.with_name("compressed")


def test_a_float_checkpoint_has_the_statistics_of_its_model(model, floats):
    inspected = list(inspect_checkpoint(str(floats)))
    assert [weight.statistics for weight in inspected] == weight_statistics(model)
    assert {weight.bits_per_weight for weight in inspected} == {32}


def test_a_compressed_checkpoint_has_the_statistics_of_its_decoded_model(compressed):
    model = AutoModelForCausalLM.from_pretrained(compressed)
    inspected = list(inspect_checkpoint(str(compressed)))
    assert [weight.statistics for weight in inspected] == weight_statistics(model, include=["*"])
    encoded = model.hf_quantizer.encoded
    assert [w.bits_per_weight for w in inspected] == [encoded[w.statistics.name].bits_per_weight for w in inspected]


def test_no_weight_is_loaded_by_transformers(floats, compressed, monkeypatch):
    def refuse(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(PreTrainedModel, "from_pretrained", refuse)
    assert len(list(inspect_checkpoint(str(floats)))) == 4
    assert len(list(inspect_checkpoint(str(compressed)))) == 6


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """A model that transformers saves under other names than its own; float, compressed, and the float model."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4))
    path = tmp_path_factory.mktemp("renamed") / "float"
    model.save_pretrained(path)
    R2Quantizer.from_pretrained(path).quantize(path.with_name("compressed"), R2QuantizationConfig(bits=4))
    if set(select_weights(model)) <= load_file(path / "model.safetensors").keys():
        pytest.skip("this transformers names the weights of a ViT as it does in files")
    return path, path.with_name("compressed"), model


def test_weights_have_the_names_of_the_model_where_files_name_them_otherwise(renamed):
    floats, compressed, model = renamed
    assert [weight.statistics for weight in inspect_checkpoint(str(floats))] == weight_statistics(model)
    decoded = AutoModelForImageClassification.from_pretrained(compressed)
    assert [weight.statistics for weight in inspect_checkpoint(str(compressed))] == weight_statistics(decoded)


def test_files_without_the_weights_of_the_model_are_inspected_by_their_own_names(renamed, tmp_path):
    stored = load_file(renamed[0] / "model.safetensors")
    copytree(renamed[0], tmp_path, dirs_exist_ok=True)
    save_file({f"other.{name}": tensor for name, tensor in stored.items()}, tmp_path / "model.safetensors")
    expected = sorted(f"other.{name}" for name, tensor in stored.items() if tensor.dim() > 1)
    assert sorted(weight.statistics.name for weight in inspect_checkpoint(str(tmp_path))) == expected


def test_files_without_a_config_are_inspected_too(tmp_path):
    weight = torch.randn(4, 6)
    save_file({"a": weight, "b": torch.ones(3), "c": torch.ones(2, 2).long()}, tmp_path / "model.safetensors")
    (found,) = inspect_checkpoint(str(tmp_path))
    assert found.statistics.name == "a"
    assert found.statistics.max == weight.max().item()


def test_what_cannot_be_inspected_is_refused_with_what_to_do(tmp_path, compressed):
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        list(inspect_checkpoint(str(tmp_path)))
    save_file({"b": torch.ones(3)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="nothing to inspect"):
        list(inspect_checkpoint(str(tmp_path)))
    tensors = load_file(compressed / "model.safetensors")
    save_file({**tensors, "transformer.wte.weight": torch.ones(3)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((compressed / "config.json").read_text())
    with pytest.raises(ValueError, match=r"do not hold 'transformer\.wte\.weight' as config\.json describes it"):
        list(inspect_checkpoint(str(tmp_path)))
    config = json.loads((compressed / "config.json").read_text())
    config["quantization_config"]["format_version"] = 2
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="upgrade with `pip install -U hf_r2`"):
        list(inspect_checkpoint(str(tmp_path)))


def test_the_command_prints_a_table_and_json_and_draws(floats, compressed, tmp_path):
    result = run(app, ["inspect", str(compressed), "--png", str(tmp_path / "weights.png")])
    assert result.exit_code == 0, result.output
    assert "transformer.wte.weight" in result.stdout
    assert matplotlib.image.imread(tmp_path / "weights.png").std() > 0
    weights = json.loads(run(app, ["inspect", str(floats), "--json"]).stdout)
    assert {weight["bits_per_weight"] for weight in weights} == {32}
    assert {"name", "shape", "crest_factor", "kurtosis", "sqnr"} <= weights[0].keys()
