"""Core ML packages: converted on any system, and their weights read back."""

import numpy as np
import pytest
from export_models import batch, encoded_weight

from hf_r2.codecs import decode
from hf_r2.export import export, to_coreml
from hf_r2.export.exporter import load_compressed
from hf_r2.export.program import compressed_parameters, is_turned

coremltools = pytest.importorskip("coremltools")


def constants(package):
    """Read a package's compressed weights: the operation and its arguments by parameter name."""
    from coremltools.converters.mil.frontend.milproto.load import load

    model = coremltools.models.MLModel(str(package), skip_model_load=True)
    program = load(model.get_spec(), model.get_spec().specificationVersion, model.weights_dir)
    found = [op for op in program.functions["main"].operations if op.op_type.startswith("constexpr")]
    return {op.outputs[0].name: op for op in found}


def dense(op):
    """Decode a weight as the operation's definition says, in float16."""
    if op.op_type == "constexpr_lut_to_dense":
        indices, lut = op.indices.val.astype(np.int64), op.lut.val[..., 0]
        for axis, (size, groups) in enumerate(zip(indices.shape, lut.shape[:-1], strict=True)):
            lut = np.repeat(lut, size // groups, axis=axis)
        return np.take_along_axis(lut, indices[..., None], axis=-1)[..., 0]
    scale, data = op.scale.val, op.data.val.astype(np.float16)
    offset = 0 if op.offset is None else op.offset.val.astype(np.float16)
    for axis, (size, groups) in enumerate(zip(data.shape, op.scale.val.shape, strict=True)):
        scale = np.repeat(scale, size // groups, axis=axis)
        offset = np.repeat(offset, size // groups, axis=axis) if np.ndim(offset) else offset
    return (data - offset) * scale


CASES = [
    ("resnet", {"method": "palette", "bits": 2, "grain": "tensor"}),
    pytest.param(
        "resnet",
        {"method": "palette", "bits": 4, "grain": 9, "skip": ["*embedder*", "*shortcut*", "classifier*"]},
        marks=pytest.mark.slow,
    ),
    pytest.param("resnet", {"method": "uniform", "bits": 5, "grid": "full"}, marks=pytest.mark.slow),
    pytest.param("mobilenet_v1", {"method": "palette", "bits": 1}, marks=pytest.mark.slow),
    # Groups of 4 inputs would cut the kernels of the patch embedding, which Core ML has no form for
    pytest.param(
        "vit",
        {"method": "least_squares", "bits": 2, "grain": 4, "skip": ["*patch_embeddings*"]},
        marks=pytest.mark.slow,
    ),
    pytest.param("bert", {"method": "palette", "bits": 4, "grain": 4, "include": ["*"]}, marks=pytest.mark.slow),
    ("gpt2", {"method": "palette", "bits": 2, "grain": 4, "include": ["*"]}),
    pytest.param("llama", {"method": "uniform", "bits": 2}, marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("family", "settings"), CASES)
def test_weights_of_look_up_tables_are_ours_in_float16(family, settings, compressed_checkpoint, tmp_path):
    source = compressed_checkpoint(family, **settings)
    export(source, tmp_path / "out", "coreml")
    found = constants(tmp_path / "out" / "model.mlpackage")
    model = load_compressed(str(source))
    for name, encoded in model.hf_quantizer.encoded.items():
        tied = [other for other, weight in compressed_parameters(model).items() if weight is encoded]
        (op,) = [op for key, op in found.items() if any(other.replace(".", "_") in key for other in tied)]
        assert op.op_type == "constexpr_lut_to_dense"
        weight = decode(encoded).half().numpy()
        assert np.array_equal(dense(op), weight.T if is_turned(model, name) else weight)
    assert len(found) == len(model.hf_quantizer.encoded)
    package = coremltools.models.MLModel(str(tmp_path / "out" / "model.mlpackage"), skip_model_load=True)
    description = package.get_spec().description
    assert [value.name for value in description.input] == list(batch(family))
    assert [value.name for value in description.output] == ["logits"]


@pytest.mark.parametrize("symmetric", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_integers_and_scales_are_ours(symmetric, compressed_checkpoint, tmp_path):
    overrides = {"classifier*": {"bits": 8}}
    source = compressed_checkpoint("resnet", bits=4, symmetric=symmetric, overrides=overrides)
    export(source, tmp_path / "out", "coreml")
    found = constants(tmp_path / "out" / "model.mlpackage")
    for name, encoded in load_compressed(str(source)).hf_quantizer.encoded.items():
        (op,) = [op for key, op in found.items() if name.replace(".", "_") in key]
        assert op.op_type == "constexpr_blockwise_shift_scale"
        scale = encoded.codebook["scale"].view(-1, *[1] * (len(encoded.shape) - 1))
        assert np.array_equal(op.scale.val, scale.half().numpy())
        levels = (decode(encoded) / scale).round()
        assert np.array_equal(dense(op), (levels.half() * scale.half()).numpy())


@pytest.mark.parametrize(("codec", "grain", "kind"), [("vectors", "tensor", "linear"), ("palette_2", 5, "conv")])
def test_what_core_ml_lacks_has_no_description(codec, grain, kind):
    assert to_coreml._buffers(encoded_weight(codec, grain, kind)) == {}


def test_a_model_without_anything_to_describe_is_refused(compressed_checkpoint, tmp_path):
    source = compressed_checkpoint("resnet", method="palette", bits=4, cluster_dim=2)
    with pytest.raises(ValueError, match="Core ML has no form for the weights"):
        export(source, tmp_path / "out", "coreml")
    assert not (tmp_path / "out").exists()


def test_only_what_core_ml_has_is_described(compressed_checkpoint):
    source = str(compressed_checkpoint("resnet", bits=4, overrides={"classifier*": {"grain": 5}}))
    model = load_compressed(source)
    to_coreml.describe(model, source)
    described = {name for name, _ in model.named_buffers() if name.endswith("compression_type")}
    assert len(described) == len(model.hf_quantizer.encoded) - 1
    assert not any(name.startswith("classifier") for name in described)
