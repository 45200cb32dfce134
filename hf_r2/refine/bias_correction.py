"""Bias correction: take back the mean shift of outputs that compression makes (Nagel et al., arXiv 1906.04721, 4.2).

Compressed weights W + ε answer to inputs x with E[ε x] more in the mean. Where x comes from a batch norm with bias β
and weight γ and a ReLU, E[x] is known without data: for a normal distribution of mean β and deviation |γ|

    E[ReLU(z)] = β Φ(β / |γ|) + |γ| φ(β / |γ|),    E[ReLU6(z)] = E[ReLU(z)] − E[ReLU(z − 6)].

Elsewhere the shift is measured on calibration data, as the mean output of the compressed model less the float model's,
layer by layer, so that it holds what earlier layers left over.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_r2.refine.capture import Batches, output_means, trace
from hf_r2.refine.chains import chains, pairs
from hf_r2.refine.matrices import is_matrix_layer, response
from hf_r2.selection import output_first


@dataclass
class ExpectedOutput:
    """What the outputs of a float layer are in the mean.

    Args:
        outputs: float64 `(out,)`; without bias, if they answer to known `inputs`.
        inputs: mean inputs by batch-norm statistics, float64 `(in,)`; None if outputs were measured.
    """

    outputs: Tensor
    inputs: Tensor | None = None


@torch.no_grad()
def expected_outputs(
    model: nn.Module, selection: Mapping[str, tuple[nn.Module, str]], batches: Batches
) -> dict[str, ExpectedOutput]:
    """Find the mean outputs of the selected layers of a float model, before it is compressed.

    Args:
        model: float model; left in evaluation mode.
        selection: what `select_weights` returns.
        batches: calibration data, for the layers without batch-norm statistics before them.
    """
    layers = matrix_layers(selection)
    inputs = expected_inputs(model)
    known = {
        name: ExpectedOutput(_response(layer, inputs[layer]), inputs[layer])
        for name, layer in layers.items()
        if layer in inputs
    }
    others = {name: layer for name, layer in layers.items() if name not in known}
    measured = output_means(model.eval(), others, batches)
    return {**known, **{name: ExpectedOutput(mean) for name, mean in measured.items()}}


@torch.no_grad()
def correct_bias(
    model: nn.Module,
    selection: Mapping[str, tuple[nn.Module, str]],
    expected: Mapping[str, ExpectedOutput],
    batches: Batches,
) -> None:
    """Take the mean shift back from the biases of a compressed model, layer by layer in order of use.

    A layer without a bias is corrected in the running mean of the batch norm behind it; one with neither is left.

    Args:
        model: compressed model; changed in place, left in evaluation mode.
        selection: what `select_weights` returns.
        expected: what [`expected_outputs`] found before.
        batches: the same calibration data.

    Raises:
        ValueError: if there are no batches, and if no layer has a bias or a batch norm.
    """
    layers = matrix_layers(selection)
    found = trace(model, layers, batches)
    carriers = {name: _carrier(layers[name], found.norm(name)) for name in found.calls}
    if not any(carrier is not None for carrier in carriers.values()):
        raise ValueError(f"no layer of {type(model).__name__} has a bias; remove 'bias_correction' from refine")
    for name in tqdm(found.calls, desc="Correcting biases", unit="layer"):
        layer, wanted = layers[name], expected[name]
        if carriers[name] is None:
            continue
        if wanted.inputs is None:
            outputs = output_means(model, {name: layer}, batches)[name]
        else:
            outputs = _response(layer, wanted.inputs)
        carriers[name].sub_((outputs - wanted.outputs) * (1 if layer.bias is not None else -1))


def expected_inputs(model: nn.Module) -> dict[nn.Module, Tensor]:
    """Return E[x] of the convolutions whose inputs come from a batch norm and a ReLU or ReLU6: float64 `(in,)`."""
    means = {}
    for unit, following in pairs(chains(model)):
        norm = unit.normalization
        mean, deviation = norm.bias.detach().double(), norm.weight.detach().abs().double()
        if isinstance(unit.activation, nn.ReLU):
            means[following.convolution] = relu_mean(mean, deviation)
        elif isinstance(unit.activation, nn.ReLU6):
            means[following.convolution] = relu_mean(mean, deviation) - relu_mean(mean - 6, deviation)
    return means


def relu_mean(mean: Tensor, deviation: Tensor) -> Tensor:
    """Return E[max(z, 0)] of normal z: μ Φ(μ / σ) + σ φ(μ / σ), and max(μ, 0) where σ is 0; elementwise."""
    ratio = mean / torch.where(deviation > 0, deviation, torch.ones_like(deviation))
    density = torch.exp(-ratio.square() / 2) / math.sqrt(2 * math.pi)
    spread = mean * torch.special.ndtr(ratio) + deviation * density
    return torch.where(deviation > 0, spread, mean.clamp_min(0))


def matrix_layers(selection: Mapping[str, tuple[nn.Module, str]]) -> dict[str, nn.Module]:
    """Take the layers of a selection that multiply with their weights, by the names of these."""
    return {name: module for name, (module, _) in selection.items() if is_matrix_layer(module)}


def _response(layer: nn.Module, constant: Tensor) -> Tensor:
    return response(layer, output_first(layer, layer.weight.detach()).double(), constant)


def _carrier(layer: nn.Module, norm: nn.Module | None) -> Tensor | None:
    """Return the tensor that takes a correction: the layer's bias, or the running mean that is subtracted from it."""
    if layer.bias is not None:
        return layer.bias
    return None if norm is None else norm.running_mean
