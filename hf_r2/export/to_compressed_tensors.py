"""compressed-tensors, format `pack-quantized`: a checkpoint that transformers loads without hf_r2.

What the format can say is uniform weights of Linear layers, of 2–8 bits, with a scale for the tensor, for each output
channel or for each run of inputs that divides a channel: all grids but midrise, and affine ones of a whole tensor
(transformers 5.23 with compressed-tensors 0.20 does not load the packed zero points of channels and groups). All other
weights are stored as decoded floats. The codes of a row are packed into 32-bit words, padded to a whole word.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_r2.codecs import Encoded
from hf_r2.export.layout import blocks_of

logger = logging.get_logger(__name__)


def write(model: PreTrainedModel, source: str, directory: Path) -> None:
    """Write a compressed model as a checkpoint of compressed-tensors.

    Args:
        model: compressed model in float32, its weights decoded.
        source: the checkpoint that it comes from, for messages.
        directory: where the files go.

    Raises:
        ValueError: if the format can say none of the weights.
    """
    encoded = dict(model.hf_quantizer.encoded)
    packed = {name: weight for name, weight in encoded.items() if _is_expressible(model, name, weight)}
    if not packed:
        raise ValueError(
            f"compressed-tensors has no way to store the weights of {source}: it takes uniform ones of Linear layers, "
            "not midrise, affine only with grain 'tensor', and groups that divide the inputs. Export to onnx instead"
        )
    if len(packed) < len(encoded):
        left = [name for name in encoded if name not in packed]
        logger.warning(
            f"compressed-tensors has no way to store {len(left)} of {len(encoded)} weights, such as {left[0]!r}: they "
            "are stored as floats"
        )
    model.dequantize()
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in packed}
    groups: dict[str, dict[str, Any]] = {}
    for name, weight in packed.items():
        layer = name.removesuffix(".weight")
        state.update({f"{name}_{key}": tensor for key, tensor in _tensors(weight).items()})
        scheme = _scheme(weight)
        groups.setdefault(str(scheme), {"weights": scheme, "targets": []})["targets"].append(layer)
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [],
    }
    model.save_pretrained(directory, state_dict=state)


def _is_expressible(model: PreTrainedModel, name: str, encoded: Encoded) -> bool:
    """Tell whether the format has a weight's layer, codec and grain; a tied weight has layers of two kinds."""
    settings = encoded.settings
    if settings.method != "uniform" or settings.grid == "midrise" or name in model.all_tied_weights_keys.values():
        return False
    if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
        return False
    if settings.grain == "tensor":
        return True
    return settings.symmetric and (settings.grain == "channel" or encoded.shape[1] % settings.grain == 0)


def _scheme(encoded: Encoded) -> dict[str, Any]:
    strategy = encoded.grain if isinstance(encoded.grain, str) else "group"
    scheme = {"num_bits": encoded.bits, "type": "int", "symmetric": encoded.settings.symmetric, "strategy": strategy}
    return scheme if strategy != "group" else {**scheme, "group_size": encoded.grain}


def _tensors(encoded: Encoded) -> dict[str, Tensor]:
    """Codes, scales and zero point, by the format's names behind `weight_`."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    (block,) = blocks_of(encoded)
    rows = 1 if encoded.grain == "tensor" else encoded.shape[0]
    half = 2 ** (encoded.bits - 1)  # the format's codes are signed
    codes = (block.codes.reshape(encoded.shape).short() - half).to(torch.int8)
    scale = block.scale.view(rows, -1)
    tensors = {
        "packed": pack_to_int32(codes, encoded.bits),
        "scale": scale.flatten() if encoded.grain == "tensor" else scale,
        "shape": torch.tensor(encoded.shape),
    }
    if not encoded.settings.symmetric:
        tensors["zero_point"] = (block.offset.flatten().short() - half).to(torch.int8)
    return tensors
