"""compressed-tensors, format `pack-quantized`: a checkpoint that transformers loads without hf_r2.

What the format can say is uniform weights of Linear layers, of 2–8 bits, with a scale for the tensor, for each output
channel or for each run of inputs that divides a channel, on all grids but midrise. All other weights are stored as
decoded floats. The codes of a row are packed into 32-bit words, padded to a whole word, and so are the zero points of a
column of channels.

transformers 5.23 loads packed zero points (affine channels and groups) only where it decodes all weights while loading,
which `"dequantize"` in the config asks for, and then by one scheme for all of them. Beside weights of other schemes
affine channels and groups are stored as floats.
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
    schemes = {name: _scheme(weight) for name, weight in packed.items()}
    dequantize = any(map(_has_packed_zeros, packed.values()))
    if dequantize and any(scheme != next(iter(schemes.values())) for scheme in schemes.values()):
        packed = {name: weight for name, weight in packed.items() if not _has_packed_zeros(weight)}
        dequantize = False
    if not packed:
        raise ValueError(
            f"compressed-tensors has no way to store the weights of {source}: it takes uniform ones of Linear layers, "
            "not midrise, with groups that divide the inputs, affine channels and groups only if all weights have the "
            "same bits and grain. Export to onnx instead"
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
        group = {"weights": schemes[name], "targets": []}
        groups.setdefault(str(schemes[name]), group)["targets"].append(layer)
    model.config.quantization_config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {f"group_{index}": group for index, group in enumerate(groups.values())},
        "ignore": [],
        **({"dequantize": True} if dequantize else {}),
    }
    model.save_pretrained(directory, state_dict=state)


def _is_expressible(model: PreTrainedModel, name: str, encoded: Encoded) -> bool:
    """Tell whether the format has a weight's layer, codec and grain; a tied weight has layers of two kinds."""
    settings = encoded.settings
    if settings.method != "uniform" or settings.grid == "midrise" or name in model.all_tied_weights_keys.values():
        return False
    if not isinstance(model.get_submodule(name.rpartition(".")[0]), nn.Linear):
        return False
    if isinstance(settings.grain, str):
        return True
    # compressed-tensors 0.20 fails to unpack 4-bit zero points of several groups that fill one word
    one_word = not settings.symmetric and encoded.bits == 4 and encoded.shape[0] <= 8
    return encoded.shape[1] % settings.grain == 0 and not one_word


def _has_packed_zeros(encoded: Encoded) -> bool:
    return not encoded.settings.symmetric and encoded.grain != "tensor"


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
        zeros = (block.offset.view(rows, -1).short() - half).to(torch.int8)
        packed = _has_packed_zeros(encoded)
        tensors["zero_point"] = pack_to_int32(zeros, encoded.bits, packed_dim=0) if packed else zeros.flatten()
    return tensors
