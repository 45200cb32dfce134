"""From a compressed checkpoint to a directory of another format."""

import importlib
import importlib.util
import os
from dataclasses import dataclass

import torch
from optimum.utils.save_utils import maybe_load_preprocessors
from transformers import PreTrainedModel

from hf_r2.files import atomic_directory
from hf_r2.quantization.skeleton import compressed_model_class


@dataclass(frozen=True)
class Format:
    """Where an exporter lives, and what it needs.

    Args:
        module: module with a function `write(model, source, directory)`.
        libraries: modules that it imports; the extra of the format's name installs them.
    """

    module: str
    libraries: tuple[str, ...]


FORMATS = {
    "onnx": Format("hf_r2.export.to_onnx", ("onnx", "onnxscript")),
    "openvino": Format("hf_r2.export.to_openvino", ("openvino", "onnx", "onnxscript")),
    "coreml": Format("hf_r2.export.to_coreml", ("coremltools",)),
    "compressed-tensors": Format("hf_r2.export.to_compressed_tensors", ("compressed_tensors",)),
}
"""Formats by the names that the command line and the extras have for them."""


def export(source: str | os.PathLike[str], save_dir: str | os.PathLike[str], format: str) -> None:
    """Write a compressed checkpoint in another format, with its preprocessors.

    Everything is float32 but the codes, whatever the dtype of the checkpoint.

    Args:
        source: directory or Hub name of a compressed checkpoint.
        save_dir: where the export goes; it appears as a whole or not at all.
        format: one of `FORMATS`: `"onnx"` (`model.onnx`), `"openvino"` (`openvino_model.xml` and `.bin`), `"coreml"`
            (`model.mlpackage`) or `"compressed-tensors"` (a checkpoint that transformers loads without hf_r2).

    Raises:
        ValueError: for an unknown format, without the libraries of a format (naming the extra), for a source that is
            not compressed by hf_r2, quantizes inputs, or is of a task that the format is not written for.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown format {format!r}: use one of {', '.join(FORMATS)}")
    for library in FORMATS[format].libraries:
        if importlib.util.find_spec(library) is None:
            raise ValueError(f'{library} is not installed: pip install "hf_r2[{format}]"')
    source = os.fspath(source)
    model = load_compressed(source)
    write = importlib.import_module(FORMATS[format].module).write
    with atomic_directory(save_dir) as scratch:
        write(model, source, scratch)
        for preprocessor in maybe_load_preprocessors(source):
            preprocessor.save_pretrained(scratch)


def load_compressed(source: str) -> PreTrainedModel:
    """Load a compressed checkpoint in float32, ready to be exported.

    Raises:
        ValueError: if it is not compressed by hf_r2, or quantizes the inputs of layers.
    """
    model = compressed_model_class(source).from_pretrained(source, dtype=torch.float32)
    if model.config.quantization_config.activations is not None:
        raise ValueError(
            f"{source} also quantizes the inputs of its layers, which no export can: compress it without activations, "
            "or run it with transformers"
        )
    return model.eval()
