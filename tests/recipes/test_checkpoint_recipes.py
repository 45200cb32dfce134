"""Compression and evaluation alone, over a checkpoint that no recipe made, as their users run them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import ResNetConfig, ResNetForImageClassification, ViTImageProcessor

from hf_r2.report import Manifest

ROOT = Path(__file__).parents[2]
RECIPE = "recipes/vision/digits/r2_2bit.yaml"

pytestmark = pytest.mark.slow


def run(script, *arguments):
    command = [sys.executable, f"recipes/{script}", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=dict(os.environ), timeout=300)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "resnet"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=16, hidden_sizes=[16, 32], depths=[1, 1], layer_type="basic")
    config.id2label = {index: str(index) for index in range(10)}
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def compressed(model, tmp_path_factory):
    output = tmp_path_factory.mktemp("compressed") / "resnet-3bit"
    options = ["--quantization.bits", "3", "--quantization.refine", "[batch_norm]"]
    result = run("quantize.py", RECIPE, model, output, *options)
    assert result.returncode == 0, result.stderr[-2000:]
    return output


def test_a_recipes_quantization_compresses_any_checkpoint(compressed):
    config = Manifest.load(compressed).last("quantize")["quantization_config"]
    assert (config["bits"], config["grain"], config["refine"]) == (3, "tensor", ["batch_norm"])
    assert ["classifier.*", {"bits": 8}] in config["overrides"]
    assert (compressed / "README.md").is_file()


def test_a_recipes_data_measure_any_checkpoint(compressed, model):
    result = run("evaluate_checkpoint.py", RECIPE, compressed, "--float", model, "--record")
    assert result.returncode == 0, result.stderr[-2000:]
    figures = json.loads(result.stdout)
    recorded = Manifest.load(compressed).last("evaluate")
    assert figures["examples"] == 629
    assert recorded["rows"][0]["agreement"] == figures["agreement"]
    assert recorded["data"]["split"] == "test"


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        ("quantize.py", [RECIPE, "nowhere", "out"], "nowhere"),
        ("quantize.py", [RECIPE, "{model}", "out", "--bits", "3"], "overrides are --quantization.key value"),
        ("evaluate_checkpoint.py", ["recipes/none.yaml", "{model}"], "cannot read the recipe"),
        ("evaluate_checkpoint.py", [RECIPE, "{model}", "--split", "dev"], "has no split 'dev'"),
        ("evaluate_checkpoint.py", [RECIPE, "{model}", "--record"], "no manifest of a compressed checkpoint"),
    ],
)
def test_mistakes_are_said_in_one_line(model, script, arguments, message):
    result = run(script, *(argument.format(model=model) for argument in arguments))
    assert result.returncode != 0
    assert message in result.stderr
    assert "Traceback" not in result.stderr
