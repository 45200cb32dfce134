"""Quantizers on the inputs of layers: put on, let act, calibrated and taken off."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.pytorch_utils import Conv1D

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.binary_activations import BinaryInputs
from hf_r2.aware.dorefa import DoReFaInputs
from hf_r2.aware.ewgs import EWGSInputs
from hf_r2.aware.input_quantizer import InputQuantizer
from hf_r2.aware.lsq import LSQInputs
from hf_r2.aware.pact import PACTInputs
from hf_r2.aware.uniform_activations import UniformInputs

INPUT_QUANTIZERS: dict[str, type[InputQuantizer]] = {
    "least_squares": BinaryInputs,
    "uniform": UniformInputs,
    "lsq": LSQInputs,
    "pact": PACTInputs,
    "dorefa": DoReFaInputs,
    "ewgs": EWGSInputs,
}
"""The quantizer of each method of [`ActivationSettings`]."""


def quantize_inputs(layers: Mapping[str, nn.Module], settings: ActivationSettings) -> None:
    """Put a quantizer on each layer, inactive at first.

    Args:
        layers: Linear, Conv1d/2d/3d or transformers' Conv1D, by the names of their weights.
        settings: how.

    Raises:
        ValueError: for another kind of layer, such as an embedding, whose inputs are indices.
    """
    for name, layer in layers.items():
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d | Conv1D):
            raise ValueError(
                f"the inputs of {name} ({type(layer).__name__}) cannot be quantized: put it into activations.skip"
            )
    for layer in layers.values():
        by_token = isinstance(layer, nn.Linear | Conv1D)
        quantizer = INPUT_QUANTIZERS[settings.method](settings, by_token).to(layer.weight.device)
        layer.input_quantizer = quantizer.train(layer.training)
        quantizer.handle = layer.register_forward_pre_hook(_quantize_input)


def input_quantizers(model: nn.Module) -> list[InputQuantizer]:
    """List the quantizers in a model."""
    return [module for module in model.modules() if isinstance(module, InputQuantizer)]


def activate_inputs(model: nn.Module) -> None:
    """Let the quantizers of a model act."""
    for quantizer in input_quantizers(model):
        quantizer.active = True


def release_inputs(model: nn.Module) -> None:
    """Take all quantizers off."""
    for layer in list(model.modules()):
        if isinstance(getattr(layer, "input_quantizer", None), InputQuantizer):
            layer.input_quantizer.handle.remove()
            del layer.input_quantizer


@torch.no_grad()
def observe_inputs(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> None:
    """Take running averages, or static ranges, over calibration data, all batches alike.

    Args:
        model: with active quantizers; left in evaluation mode.
        batches: keyword arguments of the model, one mapping per batch; no labels are needed.

    Raises:
        ValueError: if there are no batches.
    """
    device = next(model.parameters()).device
    quantizers = input_quantizers(model.eval())
    for quantizer in quantizers:
        quantizer.restart()
    for batch in tqdm(batches, desc="Averaging activations", unit="batch"):
        model(**{key: value.to(device) for key, value in batch.items()})
    for quantizer in quantizers:
        quantizer.observing = False
    if not any(quantizer.batches for quantizer in quantizers):
        raise ValueError("statistics of activations need calibration data; give some, or leave out what asks for them")


def _quantize_input(layer: nn.Module, inputs: tuple) -> tuple:
    return (layer.input_quantizer(inputs[0]), *inputs[1:])
