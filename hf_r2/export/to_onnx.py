"""ONNX: codes in the narrowest type that holds them, and the nodes that make weights of them.

| codec | nodes |
|---|---|
| uniform, but midrise | DequantizeLinear: one scale, one for each output channel, or one for each run of inputs |
| uniform, midrise | Cast, Sub, Mul: its offset is half a whole number, which DequantizeLinear does not have |
| palette, least_squares | GatherND: the entries of every group's look-up table; a basis of b scales has 2^b entries |

Codes of 1 and 2 bits are uint2, of 3 and 4 bits uint4, all others uint8. uint2 needs opset 25.
"""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_r2.codecs import Encoded
from hf_r2.export.layout import Grid, Table, blocks_of, packed_codes
from hf_r2.export.program import ExampleInputs, compressed_parameters, example_inputs, is_turned, traced
from hf_r2.grain import join

if TYPE_CHECKING:
    import onnx_ir as ir

FILE = "model.onnx"
_OPSET, _IR_VERSION = 25, 13


def write(model: PreTrainedModel, source: str, directory: Path) -> None:
    """Write a compressed model as `model.onnx`, with `logits` as its output.

    Args:
        model: compressed model in float32, its weights decoded.
        source: the checkpoint that it comes from.
        directory: where the file goes.

    Raises:
        ValueError: for a task other than those of [`example_inputs`].
    """
    program = skeleton(model, example_inputs(model, source))
    compressed = compressed_parameters(model)
    for weight in list(program.graph.inputs):
        if weight.name in compressed:
            fill(program.graph, weight, compressed[weight.name], is_turned(model, weight.name))
    save(program, directory / FILE)


def skeleton(model: PreTrainedModel, inputs: ExampleInputs) -> "ir.Model":
    """Translate a model to an ONNX graph that takes its compressed weights as inputs, by their parameter names.

    So nothing folds them into constants while the graph is simplified.
    """
    import onnxscript.optimizer

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="# The axis name")  # two inputs share it, as they should
        program = torch.onnx.export(
            traced(model, inputs),
            dynamo=True,
            optimize=False,
            opset_version=_OPSET,
            input_names=list(inputs.tensors),
            output_names=["logits"],
            dynamic_shapes=tuple(inputs.axes.values()),
            verbose=False,
        )
    graph = program.model.graph
    compressed = compressed_parameters(model)
    for name in [name for name in graph.initializers if name.removeprefix("model.") in compressed]:
        value = graph.initializers.pop(name)
        value.const_value, value.name = None, name.removeprefix("model.")
        graph.inputs.append(value)
    onnxscript.optimizer.optimize(program.model)
    for node in graph.all_nodes():  # notes of the tracer, with lines of source code and paths
        node.metadata_props.clear()
        node.doc_string = None
        for value in node.outputs:
            value.metadata_props.clear()
    program.model.ir_version = _IR_VERSION
    return program.model


def fill(graph: "ir.Graph", weight: "ir.Value", encoded: Encoded, turned: bool = False) -> None:
    """Let codes, and the nodes that decode them, take the place of an input of a graph.

    Args:
        graph: the graph.
        weight: the input.
        encoded: what it holds.
        turned: whether it has the output channels second.
    """
    graph.inputs.remove(weight)
    _Decoder(graph, weight.name).replace(weight, encoded, turned)


def save(model: "ir.Model", path: Path) -> None:
    """Write an ONNX model; numbers go to a file beside it where they are too many for one."""
    import onnx_ir as ir

    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    ir.save(model, path, external_data=f"{path.name}.data" if size > 1 << 30 else None)


class _Decoder:
    """Puts the nodes that decode one weight before all others of a graph."""

    def __init__(self, graph: "ir.Graph", name: str) -> None:
        import onnx_ir as ir

        self.ir, self.graph, self.name = ir, graph, name
        self.nodes: list[ir.Node] = []

    def replace(self, weight: "ir.Value", encoded: Encoded, turned: bool) -> None:
        """Let the decoded weight take the place of a value, and of its transpose where only that is used."""
        uses = [node for node, _ in weight.uses()]
        if uses and len(encoded.shape) == 2 and all(node.op_type == "Transpose" for node in uses):
            targets, turned = [node.outputs[0] for node in uses], not turned
        else:
            targets, uses = [weight], []
        value = self._decoded(encoded, turned)
        value.type = weight.type
        self.ir.convenience.replace_all_uses_with(targets, [value] * len(targets))
        self.graph.remove(uses, safe=True)
        self.graph.insert_before(self.graph[0], self.nodes)

    def _decoded(self, encoded: Encoded, turned: bool) -> "ir.Value":
        blocks = blocks_of(encoded)
        if isinstance(blocks[0], Grid) and encoded.settings.grid != "midrise":
            return self._dequantized(blocks, encoded, turned)
        values = [self._block(block, encoded) for block in blocks]
        rows = [self._shaped(value, (encoded.shape[0], -1)) for value in values]
        value = rows[0] if len(rows) == 1 else self._node("Concat", rows, axis=1)
        value = self._shaped(value, encoded.shape)
        return self._node("Transpose", [value], perm=[1, 0]) if turned else value

    def _dequantized(self, blocks: list[Grid], encoded: Encoded, turned: bool) -> "ir.Value":
        """Codes of a whole weight through one DequantizeLinear.

        A turned weight has turned codes rather than a Transpose behind them, which onnxruntime would move in front of
        DequantizeLinear, and has none for codes of 2 bits.
        """
        codes = join([block.codes for block in blocks], encoded.shape, encoded.grain)
        rows = 1 if encoded.grain == "tensor" else encoded.shape[0]
        scale = torch.cat([block.scale.view(rows, -1) for block in blocks], dim=1)
        offset = torch.cat([block.offset.view(rows, -1) for block in blocks], dim=1).to(torch.uint8)
        axes: dict[str, int] = {}
        if encoded.grain == "tensor":
            scale, offset = scale.view(()), offset.view(())
        elif scale.shape[1] == 1:
            scale, offset, axes = scale.view(-1), offset.view(-1), {"axis": int(turned)}
        else:
            codes, axes = codes.flatten(1), {"axis": int(not turned), "block_size": int(encoded.grain)}
        if turned:
            codes = codes.T
            scale, offset = (tensor.T if tensor.dim() == 2 else tensor for tensor in (scale, offset))
        tensors = [self._codes(codes, encoded.bits), self._constant(scale, "scale"), self._codes(offset, encoded.bits)]
        value = self._node("DequantizeLinear", tensors, **axes)
        return value if turned or codes.shape == encoded.shape else self._shaped(value, encoded.shape)

    def _block(self, block: Grid | Table, encoded: Encoded) -> "ir.Value":
        """Values of a block, `(groups, n)`."""
        if isinstance(block, Grid):
            levels = self._node("Cast", [self._codes(block.codes, encoded.bits)], to=self.ir.DataType.FLOAT)
            centred = self._node("Sub", [levels, self._constant(block.offset, "offset")])
            return self._node("Mul", [centred, self._constant(block.scale, "scale")])
        groups, _, d = block.entries.shape
        places = self._node("Cast", [self._codes(block.codes[..., None], encoded.bits)], to=self.ir.DataType.INT64)
        values = self._node("GatherND", [self._constant(block.entries, "lut"), places], batch_dims=1)
        values = self._shaped(values, (groups, -1))
        if block.codes.shape[1] * d == block.size:
            return values
        ends = [self._constant(torch.tensor([end]), "range") for end in (0, block.size, 1)]
        return self._node("Slice", [values, *ends])

    def _codes(self, codes: Tensor, bits: int) -> "ir.Value":
        """Store codes in the narrowest type."""
        width, packed = packed_codes(codes, bits)
        dtype = {2: self.ir.DataType.UINT2, 4: self.ir.DataType.UINT4, 8: self.ir.DataType.UINT8}[width]
        if width == 8:
            tensor = self.ir.Tensor(packed.numpy().reshape(codes.shape), dtype)
        else:
            tensor = self.ir.PackedTensor(packed.numpy(), dtype, shape=codes.shape)
        return self._initializer(tensor, "codes")

    def _constant(self, tensor: Tensor, role: str) -> "ir.Value":
        return self._initializer(self.ir.Tensor(tensor.contiguous().numpy()), role)

    def _initializer(self, tensor: "ir.TensorProtocol", role: str) -> "ir.Value":
        name = f"{self.name}/{role}"
        while name in self.graph.initializers:
            name += "_"
        tensor.name = name
        value = self.ir.Value(name=name, type=self.ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
        self.graph.register_initializer(value)
        return value

    def _shaped(self, value: "ir.Value", shape: tuple[int, ...]) -> "ir.Value":
        return self._node("Reshape", [value, self._constant(torch.tensor(shape), "shape")])

    def _node(self, kind: str, inputs: list["ir.Value"], **attributes: object) -> "ir.Value":
        node = self.ir.node(kind, inputs, attributes)
        node.outputs[0].name = f"{self.name}/{kind}_{len(self.nodes)}"
        self.nodes.append(node)
        return node.outputs[0]
