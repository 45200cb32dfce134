"""OpenVINO: packed codes as constants, and the operations that make weights of them.

| codec | operations |
|---|---|
| uniform | Convert, Subtract, Multiply, of groups on `(channels, groups, elements)`, as OpenVINO's plugins know them |
| palette, least_squares | Gather from the look-up table of every group; a basis of b scales has 2^b entries |

Codes of 1 and 2 bits are u2, of 3 and 4 bits u4, all others u8.
"""

import io
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor
from transformers import PreTrainedModel

from hf_r2.codecs import Encoded
from hf_r2.export.layout import Grid, Table, blocks_of, packed_codes
from hf_r2.export.program import compressed_parameters, example_inputs, is_turned
from hf_r2.export.to_onnx import skeleton

if TYPE_CHECKING:
    import openvino

FILE = "openvino_model.xml"


def write(model: PreTrainedModel, source: str, directory: Path) -> None:
    """Write a compressed model as `openvino_model.xml` and `.bin`, with `logits` as its output.

    Args:
        model: compressed model in float32, its weights decoded.
        source: the checkpoint that it comes from.
        directory: where the files go.

    Raises:
        ValueError: for a task other than those of [`example_inputs`].
    """
    import onnx_ir
    import openvino

    graph = onnx_ir.to_proto(skeleton(model, example_inputs(model, source)))
    program = openvino.Core().read_model(io.BytesIO(graph.SerializeToString()))
    compressed = compressed_parameters(model)
    for parameter in program.get_parameters():
        name = parameter.get_friendly_name()
        if name in compressed:
            parameter.output(0).replace(decoder(compressed[name], is_turned(model, name)))
            program.remove_parameter(parameter)
    program.validate_nodes_and_infer_types()
    openvino.save_model(program, directory / FILE, compress_to_fp16=False)


def decoder(encoded: Encoded, turned: bool = False) -> "openvino.Output":
    """Build the operations that decode a weight to float32.

    Args:
        encoded: the weight.
        turned: whether the output channels come second.
    """
    from openvino import opset13 as ops

    blocks = blocks_of(encoded)
    if isinstance(blocks[0], Grid) and isinstance(encoded.grain, str):
        value = _centred_and_scaled(blocks[0], encoded, encoded.shape, (-1, *[1] * (len(encoded.shape) - 1)))
    else:
        rows = [ops.reshape(_values(block, encoded), [encoded.shape[0], -1], False) for block in blocks]
        value = ops.reshape(rows[0] if len(rows) == 1 else ops.concat(rows, 1), list(encoded.shape), False)
    return (ops.transpose(value, [1, 0]) if turned else value).output(0)


def _centred_and_scaled(
    block: Grid, encoded: Encoded, shape: tuple[int, ...], scales: tuple[int, ...]
) -> "openvino.Node":
    """Values of a block with codes of a shape, and scales and offsets of another."""
    from openvino import opset13 as ops

    levels = ops.convert(_codes(block.codes.reshape(shape), encoded.bits), "f32")
    return ops.multiply(ops.subtract(levels, block.offset.view(scales).numpy()), block.scale.view(scales).numpy())


def _values(block: Grid | Table, encoded: Encoded) -> "openvino.Node":
    """Values of a block, in the order of `(groups, elements of a group)`."""
    from openvino import opset13 as ops

    if isinstance(block, Grid):
        channels = encoded.shape[0]
        return _centred_and_scaled(block, encoded, (channels, -1, block.codes.shape[1]), (channels, -1, 1))
    groups, _, d = block.entries.shape
    places = ops.convert(_codes(block.codes, encoded.bits), "i32")
    values = ops.reshape(ops.gather(block.entries.numpy(), places, 1, batch_dims=1), [groups, -1], False)
    if block.codes.shape[1] * d == block.size:
        return values
    return ops.slice(values, [0], [block.size], [1], [1])


def _codes(codes: Tensor, bits: int) -> "openvino.Node":
    """Store codes in the narrowest type."""
    import openvino

    width, packed = packed_codes(codes, bits)
    kind = {2: openvino.Type.u2, 4: openvino.Type.u4, 8: openvino.Type.u8}[width]
    tensor = openvino.Tensor(packed.numpy(), list(codes.shape), kind)
    return openvino.op.Constant(tensor, shared_memory=False)
