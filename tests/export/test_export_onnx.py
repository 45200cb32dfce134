"""ONNX files, run by onnxruntime."""

import pytest
import torch
from export_models import CODECS, GRAINS, MODELS, SHAPES, batch, encoded_weight, logits, mixed
from transformers import AutoImageProcessor

from hf_r2.codecs import decode
from hf_r2.export import export, to_onnx
from hf_r2.export.exporter import load_compressed

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")
pytest.importorskip("onnxscript")
runtime = pytest.importorskip("onnxruntime")

FAST = ("resnet", "gpt2")
FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in sorted(MODELS)]
# onnxruntime rounds the inputs of products with low-bit weights to 8 bits, unless one of these is set
EXACT = ({"session.disable_quant_qdq": "1"}, {"session.qdq_matmulnbits_accuracy_level": "1"})


def session(model, settings=()):
    options = runtime.SessionOptions()
    options.intra_op_num_threads = 1
    for key, value in dict(settings).items():
        options.add_session_config_entry(key, value)
    return runtime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def decoded(encoded, turned, transposed):
    """Decode a weight by a graph that returns it, or its transpose."""
    shape = encoded.shape[::-1] if turned else encoded.shape
    weight = ir.val("weight", ir.DataType.FLOAT, shape)
    node = ir.node("Transpose", [weight], {"perm": [1, 0]}) if transposed else ir.node("Identity", [weight])
    output = ir.node("Identity", node.outputs)
    value = output.outputs[0]
    value.name, value.dtype, value.shape = "value", ir.DataType.FLOAT, ir.Shape(shape[::-1] if transposed else shape)
    graph = ir.Graph([weight], output.outputs, nodes=[node, output], opset_imports={"": 25}, name="decoder")
    to_onnx.fill(graph, weight, encoded, turned)
    proto = ir.to_proto(ir.Model(graph, ir_version=13))
    onnx.checker.check_model(proto)
    return torch.from_numpy(session(proto.SerializeToString()).run(None, {})[0])


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_decoded_weight_is_ours_bit_for_bit(codec, grain, kind):
    encoded = encoded_weight(codec, grain, kind)
    assert torch.equal(decoded(encoded, turned=False, transposed=False), decode(encoded))


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("codec", ["restricted_2", "affine_4", "midrise_3", "palette_2"])
@pytest.mark.parametrize(("turned", "transposed"), [(True, False), (False, True), (True, True)])
def test_a_turned_or_transposed_weight_is_ours_too(codec, grain, turned, transposed):
    encoded = encoded_weight(codec, grain)
    expected = decode(encoded).T if turned != transposed else decode(encoded)
    assert torch.equal(decoded(encoded, turned, transposed), expected)


@pytest.mark.parametrize(("codec", "kind"), [("restricted_2", "UINT2"), ("palette_4", "UINT4"), ("affine_5", "UINT8")])
def test_codes_have_the_narrowest_type(codec, kind):
    encoded = encoded_weight(codec, "tensor")
    weight = ir.val("weight", ir.DataType.FLOAT, encoded.shape)
    node = ir.node("Identity", [weight])
    graph = ir.Graph([weight], node.outputs, nodes=[node], name="decoder")
    to_onnx.fill(graph, weight, encoded)
    assert graph.initializers["weight/codes"].dtype == ir.DataType[kind]


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_ours_for_every_batch_and_length(family, compressed_checkpoint, tmp_path):
    source = compressed_checkpoint(family, **mixed(family))
    export(source, tmp_path / "out", "onnx")
    model = load_compressed(str(source))
    for settings in EXACT:
        runs = session(tmp_path / "out" / "model.onnx", settings)
        assert [value.name for value in runs.get_inputs()] == list(batch(family))
        assert [value.name for value in runs.get_outputs()] == ["logits"]
        for inputs in (batch(family), batch(family, examples=1, length=11)):
            (found,) = runs.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
            found = torch.from_numpy(found)
            found = found if found.dim() == 2 else found[inputs["attention_mask"].bool()]
            torch.testing.assert_close(found, logits(model, inputs), rtol=0, atol=1e-4)


def test_no_float_weight_is_left_and_no_path_of_a_source_file(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", bits=2, grain="tensor")
    export(source, tmp_path / "out", "onnx")
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert b".py" not in content
    floats = [tensor for tensor in onnx.load_from_string(content).graph.initializer if tensor.data_type == 1]
    assert all(len(tensor.dims) < 2 for tensor in floats)
    assert AutoImageProcessor.from_pretrained(tmp_path / "out").size == {"shortest_edge": 32}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]
