"""Core ML: the converter of coremltools reads from buffers beside a weight how it was compressed.

| codec | operation |
|---|---|
| uniform of 4 and 8 bits, but midrise | `constexpr_blockwise_shift_scale`: integers and scales |
| palette, least_squares, all other uniform | `constexpr_lut_to_dense`: indices and look-up tables |

Indices have 1, 2, 3, 4, 6 or 8 bits: tables of 5 and 7 bits are filled up. Groups must be whole kernels of convolutions
and divide their inputs, and vectors of weights that share a code lie otherwise in Core ML: weights that do not fit stay
float. Scales and tables are float16, the precision that Core ML computes in: the weights of look-up tables are ours,
rounded to float16.
"""

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.utils import logging

from hf_r2.codecs import Encoded
from hf_r2.codecs.uniform import divisor
from hf_r2.export.layout import Grid, blocks_of
from hf_r2.export.program import compressed_parameters, example_inputs, is_turned, traced

FILE = "model.mlpackage"
_LENGTH = 128  # tokens of a text
_WIDTHS = (1, 2, 3, 4, 6, 8)  # bits of an index
_PALETTIZATION, _QUANTIZATION = 2, 3

logger = logging.get_logger(__name__)


def write(model: PreTrainedModel, source: str, directory: Path) -> None:
    """Write a compressed model as `model.mlpackage`, with `logits` as its output.

    It takes one image, or one text of 128 tokens (or as many as the model has places for): texts are padded, and the
    attention mask says how far they go.

    Args:
        model: compressed model in float32, its weights decoded.
        source: the checkpoint that it comes from.
        directory: where the package goes.

    Raises:
        ValueError: for a task other than those of [`example_inputs`], for a model with operations that coremltools
            cannot convert, and if Core ML has a form for none of the weights.
    """
    import coremltools

    describe(model, source)
    length = min(_LENGTH, getattr(model.config, "max_position_embeddings", _LENGTH))
    inputs = example_inputs(model, source, batch=1, length=length)
    types = [
        coremltools.TensorType(name, tensor.shape, np.float32 if tensor.is_floating_point() else np.int32)
        for name, tensor in inputs.tensors.items()
    ]
    try:
        converted = coremltools.convert(
            _without_aliases(traced(model, inputs, fixed=True)),
            inputs=types,
            outputs=[coremltools.TensorType("logits")],
            minimum_deployment_target=coremltools.target.iOS18,
            skip_model_load=True,
        )
    except NotImplementedError as error:
        raise ValueError(f"coremltools cannot convert {source}: {error}. Export to onnx or openvino instead") from error
    converted.save(str(directory / FILE))


def describe(model: PreTrainedModel, source: str) -> None:
    """Put buffers beside the weights of a model that say how they are compressed.

    Raises:
        ValueError: if Core ML has a form for none of them.
    """
    compressed = compressed_parameters(model)
    buffers = {name: _buffers(encoded) for name, encoded in compressed.items()}
    left = [name for name, found in buffers.items() if not found]
    if len(left) == len(buffers):
        raise ValueError(
            f"Core ML has no form for the weights of {source}: it takes cluster_dim 1, and groups of whole kernels "
            "that divide the inputs. Export to onnx or openvino instead"
        )
    if left:
        logger.warning(f"Core ML has no form for {len(left)} of {len(buffers)} weights, such as {left[0]!r}: float16")
    for name, found in buffers.items():
        layer = model.get_submodule(name.rpartition(".")[0])
        for key, tensor in found.items():
            turned = tensor.dim() > 1 and is_turned(model, name)
            layer.register_buffer(f"_COREML_/weight/{key}", tensor.transpose(0, 1) if turned else tensor)


def _buffers(encoded: Encoded) -> dict[str, Tensor]:
    """Describe a weight in coremltools' words; empty if Core ML has no form for it."""
    leading = _groups_by_axis(encoded)
    if leading is None or encoded.settings.cluster_dim not in (None, 1):
        return {}
    (block,) = blocks_of(encoded)
    if isinstance(block, Grid) and encoded.bits in (4, 8) and encoded.settings.grid != "midrise":
        buffers = {
            "quantization_n_bits": torch.tensor(encoded.bits),
            "quantization_scale": divisor(block.scale).view(leading),
            "compression_type": torch.tensor([_QUANTIZATION]),
        }
        return buffers if encoded.settings.symmetric else {**buffers, "zero_point": block.offset.view(leading)}
    if isinstance(block, Grid):
        entries = (torch.arange(2**encoded.bits) - block.offset) * block.scale
    else:
        entries = block.entries[..., 0]
    width = next(width for width in _WIDTHS if encoded.bits <= width)
    filling = entries[:, -1:].expand(-1, 2**width - entries.shape[1])
    lut = torch.cat([entries, filling], dim=1).view(*leading, 2**width, 1)
    return {"lut": lut, "compression_type": torch.tensor([_PALETTIZATION])}


def _groups_by_axis(encoded: Encoded) -> tuple[int, ...] | None:
    """Count the groups along each axis of a weight; None if a group is no box of the weight."""
    shape, ones = encoded.shape, [1] * (len(encoded.shape) - 2)
    if encoded.grain == "tensor":
        return (1, 1, *ones)
    if encoded.grain == "channel":
        return (shape[0], 1, *ones)
    kernel = math.prod(shape[2:])
    inputs, rest = divmod(int(encoded.grain), kernel)
    return None if rest or shape[1] % inputs else (shape[0], shape[1] // inputs, *ones)


def _without_aliases(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Reduce a program to core operations, without those that only give a tensor another name."""
    program = program.run_decompositions()
    graph = program.graph_module.graph
    for node in list(graph.nodes):
        if node.target is torch.ops.aten.alias.default:
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    program.graph_module.recompile()
    return program
