"""What all exports share: the command, the refusals, and nothing half-written."""

import sys
from pathlib import Path

import pytest
from export_models import batch
from typer.testing import CliRunner

from hf_r2.cli import app
from hf_r2.export import FORMATS, export
from hf_r2.export.exporter import load_compressed
from hf_r2.export.program import example_inputs

run = CliRunner().invoke


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_without_its_libraries_a_format_names_its_extra(format, compressed_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, FORMATS[format].libraries[0], None)
    with pytest.raises(ValueError, match=rf'pip install "hf_r2\[{format}\]"'):
        export(compressed_checkpoint("resnet", bits=4), tmp_path / "out", format)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_format_has_an_extra_of_its_name(format):
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text("utf-8")
    assert f"\n{format} = [" in pyproject
    for library in FORMATS[format].libraries:
        assert f'"{library.replace("_", "-")}' in pyproject.split(f"\n{format} = [")[1].split("]")[0]


def test_an_unknown_format_is_refused_by_the_command(compressed_checkpoint, tmp_path):
    source = str(compressed_checkpoint("resnet", bits=4))
    result = run(app, ["export", source, str(tmp_path / "out"), "--format", "onxn"])
    assert result.exit_code == 1
    assert "unknown format 'onxn': use one of onnx, openvino, coreml, compressed-tensors" in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_float_checkpoint_is_refused(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", bits=4)
    model = load_compressed(str(source))
    model.dequantize()
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match="is not compressed by hf_r2"):
        load_compressed(str(tmp_path / "float"))


def test_quantized_inputs_are_refused(compressed_checkpoint):
    source = compressed_checkpoint("resnet", bits=4, activations={"bits": 4, "method": "uniform"})
    with pytest.raises(ValueError, match="also quantizes the inputs of its layers"):
        load_compressed(str(source))


def test_images_have_the_size_that_the_processor_makes(compressed_checkpoint):
    source = str(compressed_checkpoint("resnet", bits=4))
    inputs = example_inputs(load_compressed(source), source)
    assert {name: tuple(tensor.shape[1:]) for name, tensor in inputs.tensors.items()} == {"pixel_values": (3, 32, 32)}
    assert inputs.axes == {"pixel_values": {0: "batch"}}


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_texts_have_the_inputs_of_their_model(family, compressed_checkpoint):
    source = str(compressed_checkpoint(family, bits=4))
    inputs = example_inputs(load_compressed(source), source)
    assert list(inputs.tensors) == list(batch(family))
    assert all(axes == {0: "batch", 1: "length"} for axes in inputs.axes.values())


def test_a_model_of_another_task_is_refused(compressed_checkpoint):
    source = str(compressed_checkpoint("bert", bits=4))
    body = load_compressed(source).bert
    with pytest.raises(ValueError, match="BertModel: what can be exported to this format is"):
        example_inputs(body, source)
