"""Rounding weights one after another, each with what it sees behind the weights that are rounded already."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from hf_r2.codecs import CodecSettings, Encoded, decode, encode
from hf_r2.codecs.encoded import SettingsByName
from hf_r2.refine.capture import Batches, Trace, trace
from hf_r2.refine.matrices import is_matrix_layer
from hf_r2.selection import output_first

Rounding = Callable[[str, nn.Module, Tensor, CodecSettings, Trace], Encoded]
"""Compresses one weight: its name, layer, values with output channels first, settings, and the trace of the model."""


@torch.no_grad()
def round_in_sequence(
    model: nn.Module,
    selection: Mapping[str, tuple[nn.Module, str]],
    config: SettingsByName,
    batches: Batches,
    rounding: Rounding,
    description: str,
) -> dict[str, Encoded]:
    """Compress the selected weights in the order in which the model uses them.

    Weights of embeddings are compressed first, as they are; those of layers that do not run at all are left out.

    Args:
        model: float model; its weights become the compressed ones, layer by layer.
        selection: what `select_weights` returns.
        config: settings by name.
        batches: calibration data.
        rounding: what compresses the weight of a layer.
        description: text of the progress bar.

    Returns:
        The compressed weights by name.

    Raises:
        ValueError: if there are no batches.
    """
    layers = {name: module for name, (module, _) in selection.items() if is_matrix_layer(module)}
    encoded = {}
    for name, (module, _) in selection.items():
        if name not in layers:
            encoded[name] = encode(module.weight, config, name)
            module.weight.copy_(decode(encoded[name]))
    found = trace(model, layers, batches)
    for name in tqdm(found.calls, desc=description, unit="weight"):
        layer, settings = layers[name], config.settings_for(name)
        weight = output_first(layer, layer.weight.detach()).contiguous()
        encoded[name] = rounding(name, layer, weight, settings, found)
        layer.weight.copy_(output_first(layer, decode(encoded[name])))
    return encoded
