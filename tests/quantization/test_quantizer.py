"""R2Quantizer: checkpoint in, checkpoint out, and interruptions in between."""

import json
import os
import shutil
import signal
import subprocess

import datasets
import numpy as np
import pytest
import torch
from checkpoint_models import (
    FAMILIES,
    assert_same_tensors,
    build,
    load,
    logits,
    mixed,
    python_command,
    python_environment,
    selected,
    state,
)
from safetensors.torch import load_file
from tokenizers import Tokenizer, models
from transformers import AutoImageProcessor, AutoTokenizer, PreTrainedTokenizerFast, ViTImageProcessorPil
from transformers.modeling_utils import PreTrainedModel

from hf_r2 import R2QuantizationConfig, R2Quantizer, decode, weight_statistics
from hf_r2.quantization.tensor_files import TensorWriter
from hf_r2.refine import reestimate_batch_norm
from hf_r2.report import Manifest

PALETTE = {"method": "palette", "bits": 2}


def quantize(source, target, calibration_dataset=None, batch_size=64, **settings):
    quantizer = R2Quantizer.from_pretrained(source)
    return quantizer.quantize(target, R2QuantizationConfig(**settings), calibration_dataset, batch_size)


def contents(directory):
    return {file.name: file.read_bytes() for file in directory.iterdir()}


@pytest.fixture
def source(float_checkpoint, tmp_path):
    """A private float checkpoint with the manifest of an earlier stage."""
    directory = shutil.copytree(float_checkpoint("resnet"), tmp_path / "float")
    manifest = Manifest()
    manifest.add("train", seed=3, r2={"r2_loss": "l_inf"})
    manifest.save(directory)
    return directory


# --- what it writes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_saved_checkpoint_loads_as_the_returned_model(family, float_checkpoint, tmp_path):
    model = quantize(float_checkpoint(family), tmp_path / "out", **mixed(family))
    reloaded = load(family, tmp_path / "out")
    assert type(reloaded) is type(model)
    assert_same_tensors(state(reloaded), state(model))
    assert torch.equal(logits(reloaded, family), logits(model, family))


def test_the_manifest_keeps_earlier_stages_and_adds_the_facts_of_every_weight(source, tmp_path):
    model = quantize(source, tmp_path / "out", **mixed("resnet"))
    manifest = Manifest.load(tmp_path / "out")
    assert [stage["stage"] for stage in manifest.stages] == ["train", "quantize"]
    assert manifest.stages[0] == Manifest.load(source).stages[0]
    stage = manifest.last("quantize")
    assert stage["base_model"] == "float"
    assert stage["seconds"] > 0
    assert R2QuantizationConfig(**stage["quantization_config"]).overrides == model.config.quantization_config.overrides

    floats = build("resnet")
    statistics = {entry.name: entry for entry in weight_statistics(floats)}
    originals, encoded = selected(floats), model.hf_quantizer.encoded
    files = load_file(tmp_path / "out/model.safetensors")
    assert [facts["name"] for facts in stage["weights"]] == list(originals)
    for facts in stage["weights"]:
        name = facts["name"]
        original = originals[name].double()
        noise = original - decode(encoded[name]).double()
        signal_to_noise = 10 * torch.log10(original.square().sum() / noise.square().sum()).item()
        assert facts["mse"] == pytest.approx(noise.square().mean().item(), rel=1e-9)
        assert facts["compressed_sqnr"] == pytest.approx(signal_to_noise, rel=1e-9)
        packed = sum(tensor.nbytes for key, tensor in files.items() if key == name or key.startswith(f"{name}_"))
        assert facts["bits_per_weight"] == 8 * packed / original.numel()
        assert facts["codec"] == encoded[name].settings.to_dict()
        assert facts["shape"] == list(statistics[name].shape)
        for key in ("min", "max", "rms", "range", "crest_factor", "kurtosis"):
            assert facts[key] == getattr(statistics[name], key), key


def test_an_exactly_compressed_weight_has_no_finite_sqnr_in_the_manifest(source, tmp_path):
    quantize(source, tmp_path / "out", method="palette", bits=8, grain="channel")
    facts = {entry["name"]: entry for entry in Manifest.load(tmp_path / "out").last("quantize")["weights"]}
    assert facts["classifier.1.weight"]["mse"] == 0
    assert facts["classifier.1.weight"]["compressed_sqnr"] is None


def test_the_byte_counts_are_those_of_the_files(source, tmp_path):
    quantize(source, tmp_path / "out", **PALETTE)
    counted = Manifest.load(tmp_path / "out").last("quantize")["bytes"]
    assert counted["float"] == (source / "model.safetensors").stat().st_size
    assert counted["compressed"] == (tmp_path / "out/model.safetensors").stat().st_size


def test_the_byte_counts_of_a_source_in_shards_are_those_of_all_its_files(tmp_path):
    build("resnet").save_pretrained(tmp_path / "float", max_shard_size=2000)
    sizes = [file.stat().st_size for file in (tmp_path / "float").glob("*.safetensors")]
    assert len(sizes) > 2
    quantize(tmp_path / "float", tmp_path / "out", **PALETTE)
    assert Manifest.load(tmp_path / "out").last("quantize")["bytes"]["float"] == sum(sizes)


def test_the_image_processor_comes_along(source, tmp_path):
    ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.25] * 3).save_pretrained(source)
    quantize(source, tmp_path / "out", **PALETTE)
    image = np.arange(40 * 40 * 3, dtype=np.uint8).reshape(40, 40, 3)
    before, after = (AutoImageProcessor.from_pretrained(directory) for directory in (source, tmp_path / "out"))
    pixels = [processor(image, return_tensors="pt").pixel_values for processor in (before, after)]
    assert pixels[0].shape == (1, 3, 32, 32)
    assert torch.equal(*pixels)


def test_the_tokenizer_comes_along(float_checkpoint, tmp_path):
    directory = shutil.copytree(float_checkpoint("bert"), tmp_path / "float")
    vocabulary = {"[UNK]": 0, "small": 1, "file": 2}
    PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]")), unk_token="[UNK]"
    ).save_pretrained(directory)
    quantize(directory, tmp_path / "out", **PALETTE)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("small").input_ids == [1]


def test_quantizing_twice_from_one_quantizer_gives_identical_bytes(source, tmp_path):
    quantizer = R2Quantizer.from_pretrained(source)
    for name in ("first", "second"):
        quantizer.quantize(tmp_path / name, R2QuantizationConfig(**mixed("resnet")))
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first.pop("manifest.json") and second.pop("manifest.json")
    assert first == second


def test_one_config_object_serves_several_runs(source, tmp_path):
    config = R2QuantizationConfig(**PALETTE)
    quantizer = R2Quantizer.from_pretrained(source)
    for name in ("first", "second"):
        quantizer.quantize(tmp_path / name, config)
    first, second = contents(tmp_path / "first"), contents(tmp_path / "second")
    assert first["config.json"] == second["config.json"]
    assert first["model.safetensors"] == second["model.safetensors"]


def test_the_source_is_left_as_it_was(source, tmp_path):
    before = contents(source)
    quantize(source, tmp_path / "out", **PALETTE)
    assert contents(source) == before


def test_an_existing_directory_is_replaced_as_a_whole(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out/leftover.txt").write_text("old")
    quantize(source, tmp_path / "out", **PALETTE)
    assert not (tmp_path / "out/leftover.txt").exists()
    assert {"config.json", "manifest.json", "model.safetensors"} <= contents(tmp_path / "out").keys()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out"]


# --- calibration ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images():
    return torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(4))


def batch_statistics(model):
    return {name: tensor for name, tensor in state(model).items() if "running_" in name}


def test_batch_norm_is_re_estimated_the_same_from_a_dataset_and_from_batches(source, tmp_path, images):
    settings = {**PALETTE, "refine": ["batch_norm"]}
    dataset = datasets.Dataset.from_dict({"pixel_values": images.numpy(), "labels": [0, 1, 2] * 4}).with_format("torch")
    batches = [{"pixel_values": batch, "labels": torch.zeros(4)} for batch in images.split(4)]
    plain = quantize(source, tmp_path / "plain", **PALETTE)
    results = {
        "dataset": quantize(source, tmp_path / "dataset", dataset, batch_size=4, **settings),
        "list": quantize(source, tmp_path / "list", batches, **settings),
        "generator": quantize(source, tmp_path / "generator", (batch for batch in batches), **settings),
    }
    expected = load("resnet", tmp_path / "plain")
    reestimate_batch_norm(expected, [{"pixel_values": batch} for batch in images.split(4)])
    for name, model in results.items():
        assert_same_tensors(state(model), state(expected))
        assert_same_tensors(state(load("resnet", tmp_path / name)), state(expected))
    assert_same_tensors(selected(expected), selected(plain))
    before, after = batch_statistics(plain), batch_statistics(expected)
    assert not any(torch.equal(before[name], after[name]) for name in before)


def test_re_estimated_statistics_are_those_of_the_compressed_models_activations(source, tmp_path, images):
    model = quantize(
        source, tmp_path / "out", [{"pixel_values": x} for x in images.split(6)], refine=["batch_norm"], **PALETTE
    )
    embedder = model.resnet.embedder.embedder
    with torch.no_grad():
        halves = [embedder.convolution(x).transpose(0, 1).flatten(1) for x in images.split(6)]
    mean = torch.stack([x.mean(dim=1) for x in halves]).mean(dim=0)
    variance = torch.stack([x.var(dim=1) for x in halves]).mean(dim=0)
    torch.testing.assert_close(embedder.normalization.running_mean, mean, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(embedder.normalization.running_var, variance, rtol=1e-4, atol=1e-6)
    assert not model.training


def test_a_refinement_without_calibration_data_is_refused_before_anything_is_read(source, tmp_path):
    with pytest.raises(ValueError, match="needs a calibration_dataset"):
        quantize(source, tmp_path / "out", refine=["batch_norm"], **PALETTE)
    assert not (tmp_path / "out").exists()


def test_empty_calibration_data_is_refused(source, tmp_path):
    with pytest.raises(ValueError, match="needs calibration data"):
        quantize(source, tmp_path / "out", [], refine=["batch_norm"], **PALETTE)
    assert not (tmp_path / "out").exists()


def test_re_estimation_of_a_model_without_batch_norm_is_refused(float_checkpoint, tmp_path):
    batches = [{"input_ids": torch.ones(2, 4, dtype=torch.long)}]
    with pytest.raises(ValueError, match="no batch-norm layer; remove 'batch_norm' from refine"):
        quantize(float_checkpoint("bert"), tmp_path / "out", batches, refine=["batch_norm"], **PALETTE)


# --- what it refuses --------------------------------------------------------------------------------------------------


def test_an_already_quantized_source_is_refused(compressed_checkpoint):
    with pytest.raises(ValueError, match="already quantized; name the float checkpoint"):
        R2Quantizer.from_pretrained(compressed_checkpoint("resnet"))


@pytest.mark.parametrize("architectures", [["NoSuchModel"], [], None], ids=str)
def test_an_unknown_architecture_is_refused(source, architectures):
    path = source / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "architectures": architectures}))
    with pytest.raises(ValueError, match=r"architecture .* save it with save_pretrained of a transformers model class"):
        R2Quantizer.from_pretrained(source)


def test_a_target_that_is_a_file_is_refused_and_left_alone(source, tmp_path):
    (tmp_path / "out").write_text("mine")
    with pytest.raises(ValueError, match="is a file; choose a directory"):
        quantize(source, tmp_path / "out", **PALETTE)
    assert (tmp_path / "out").read_text() == "mine"


def test_an_empty_selection_and_a_pattern_without_match_are_refused_without_a_trace(source, tmp_path):
    with pytest.raises(ValueError, match="no weight of ResNetForImageClassification is selected"):
        quantize(source, tmp_path / "out", min_numel=10**6, **PALETTE)
    with pytest.raises(ValueError, match="pattern 'clasifier' matches no weight"):
        quantize(source, tmp_path / "out", skip=["clasifier"], **PALETTE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


# --- interruptions ----------------------------------------------------------------------------------------------------


def break_manifest(monkeypatch, error):
    def save(self, directory):
        raise error

    monkeypatch.setattr(Manifest, "save", save)


def break_weights(monkeypatch, error):
    original = TensorWriter.write

    def write(self, name, tensor):
        original(self, name, tensor)
        raise error

    monkeypatch.setattr(TensorWriter, "write", write)


def break_whole_model(monkeypatch, error):
    original = PreTrainedModel.save_pretrained

    def save(self, directory, **kwargs):
        original(self, directory, **kwargs)
        file = directory / "model.safetensors"
        file.write_bytes(file.read_bytes()[:100])
        raise error

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save)


def break_renaming(monkeypatch, error):
    original = os.rename

    def rename(self, target):
        if self.name.startswith(".out."):
            raise error
        original(self, target)

    monkeypatch.setattr("pathlib.Path.rename", rename)


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize(
    ("interruption", "refine", "left"),
    [
        (break_weights, [], []),
        (break_manifest, [], [".out.unfinished"]),
        (break_renaming, [], [".out.unfinished"]),
        (break_whole_model, ["equalize"], []),
        (break_manifest, ["equalize"], []),
        (break_renaming, ["equalize"], []),
    ],
)
def test_an_interrupted_save_leaves_the_old_checkpoint_and_only_what_is_finished(
    interruption, refine, left, error, source, tmp_path, monkeypatch
):
    before = state(quantize(source, tmp_path / "out", **PALETTE))
    files = contents(tmp_path / "out")
    interruption(monkeypatch, error)
    with pytest.raises(type(error)):
        quantize(source, tmp_path / "out", method="uniform", bits=4, refine=refine)
    monkeypatch.undo()
    assert contents(tmp_path / "out") == files
    assert_same_tensors(state(load("resnet", tmp_path / "out")), before)
    assert sorted(path.name for path in tmp_path.iterdir()) == [*left, "float", "out"]
    after = state(quantize(source, tmp_path / "out", method="uniform", bits=4, refine=refine))
    assert_same_tensors(state(load("resnet", tmp_path / "out")), after)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float", "out"]


def test_an_interrupted_first_save_leaves_nothing(source, tmp_path, monkeypatch):
    break_weights(monkeypatch, OSError("disk full"))
    with pytest.raises(OSError, match="disk full"):
        quantize(source, tmp_path / "out", **PALETTE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["float"]


# Writes some of the weights' file, says so and waits for its end
KILLED = """
import sys
import time

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.quantization.tensor_files import TensorWriter

write = TensorWriter.write


def write_one(self, name, tensor):
    write(self, name, tensor)
    print("half", flush=True)
    time.sleep(600)


TensorWriter.write = write_one
R2Quantizer.from_pretrained(sys.argv[1]).quantize(sys.argv[2], R2QuantizationConfig("uniform", bits=4))
"""


def test_a_process_killed_while_it_writes_leaves_the_old_checkpoint(source, tmp_path):
    out = tmp_path / "out"
    before = state(quantize(source, out, **PALETTE))
    files = contents(out)
    with subprocess.Popen(
        python_command(KILLED, source, out),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=python_environment(),
        text=True,
    ) as process:
        assert process.stdout.readline() == "half\n"
        assert (tmp_path / ".out.unfinished").exists()
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert contents(out) == files
    assert_same_tensors(state(load("resnet", out)), before)
    after = state(quantize(source, out, method="uniform", bits=4))
    assert_same_tensors(state(load("resnet", out)), after)
