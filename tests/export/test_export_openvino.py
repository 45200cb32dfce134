"""OpenVINO's intermediate representation, run by its CPU plugin."""

import numpy as np
import pytest
import torch
from export_models import CODECS, GRAINS, MODELS, SHAPES, batch, encoded_weight, logits, mixed

from hf_r2.codecs import decode
from hf_r2.export import export, to_openvino
from hf_r2.export.exporter import load_compressed

openvino = pytest.importorskip("openvino")
pytest.importorskip("onnxscript")

FLOAT = {"INFERENCE_PRECISION_HINT": "f32"}
FAST = ("resnet", "gpt2")
FAMILIES = [pytest.param(family, marks=() if family in FAST else pytest.mark.slow) for family in sorted(MODELS)]


@pytest.mark.parametrize("kind", sorted(SHAPES))
@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("codec", sorted(CODECS))
def test_a_decoded_weight_is_ours_bit_for_bit(codec, grain, kind):
    from openvino import opset13 as ops

    encoded = encoded_weight(codec, grain, kind)
    zero = ops.parameter([1], openvino.Type.f32)  # a program needs an input
    program = openvino.Model([ops.add(to_openvino.decoder(encoded), zero)], [zero])
    (found,) = openvino.compile_model(program, "CPU", FLOAT)([np.zeros(1, np.float32)]).values()
    assert torch.equal(torch.from_numpy(found), decode(encoded))


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_ours_for_every_batch_and_length(family, compressed_checkpoint, tmp_path):
    source = compressed_checkpoint(family, **mixed(family))
    export(source, tmp_path / "out", "openvino")
    program = openvino.compile_model(tmp_path / "out" / "openvino_model.xml", "CPU", FLOAT)
    assert [value.any_name for value in program.inputs] == list(batch(family))
    assert [value.any_name for value in program.outputs] == ["logits"]
    model = load_compressed(str(source))
    for inputs in (batch(family), batch(family, examples=1, length=11)):
        found = torch.from_numpy(program({name: tensor.numpy() for name, tensor in inputs.items()})["logits"])
        found = found if found.dim() == 2 else found[inputs["attention_mask"].bool()]
        torch.testing.assert_close(found, logits(model, inputs), rtol=0, atol=1e-4)


def test_codes_of_two_bits_take_two_bits(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", bits=2, grain="tensor")
    export(source, tmp_path / "out", "openvino")
    program = openvino.Core().read_model(tmp_path / "out" / "openvino_model.xml")
    constants = [node for node in program.get_ops() if node.get_type_name() == "Constant"]
    codes = [node for node in constants if node.get_element_type() == openvino.Type.u2]
    encoded = load_compressed(str(source)).hf_quantizer.encoded.values()
    assert sum(np.prod(node.shape) for node in codes) == sum(weight.shape.numel() for weight in encoded)
    largest = max(weight.shape[0] for weight in encoded)
    assert all(np.prod(node.shape) <= largest for node in constants if node.get_element_type() == openvino.Type.f32)
