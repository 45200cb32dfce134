"""The exit to optimum-quanto."""

import importlib.util
import sys

import pytest
import torch
from checkpoint_models import build, inputs
from transformers import AutoModelForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer

try:
    HAS_QUANTO = importlib.util.find_spec("optimum.quanto") is not None
except ModuleNotFoundError:
    HAS_QUANTO = False
needs_quanto = pytest.mark.skipif(not HAS_QUANTO, reason="optimum-quanto is not installed")


def quantize(source, target, **settings):
    config = R2QuantizationConfig(**settings)
    return R2Quantizer.from_pretrained(source).quantize(target, config, backend="quanto")


def test_without_quanto_the_extra_is_named(float_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "optimum.quanto", None)
    with pytest.raises(ImportError, match=r'pip install "hf_r2\[quanto\]"'):
        quantize(float_checkpoint("resnet"), tmp_path / "out", bits=8)
    assert not (tmp_path / "out").exists()


def test_an_unknown_backend_is_refused(float_checkpoint, tmp_path):
    quantizer = R2Quantizer.from_pretrained(float_checkpoint("resnet"))
    with pytest.raises(ValueError, match="unknown backend 'torchao': use 'hf_r2' or 'quanto'"):
        quantizer.quantize(tmp_path / "out", R2QuantizationConfig(), backend="torchao")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine": ["equalize", "adaround"]}, r"rounds by itself: remove \['adaround'\] from refine"),
        ({"activations": {"bits": 2}}, "takes weights only"),
    ],
)
def test_what_quanto_lacks_is_refused_before_it_is_looked_for(settings, message, float_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize(float_checkpoint("resnet"), tmp_path / "out", bits=8, **settings)


@needs_quanto
@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("resnet", {"bits": 3}, "of 2, 4 or 8 bits"),
        ("resnet", {"bits": 8, "grain": "tensor"}, "leave method, grain and the other options"),
        ("gpt2", {"bits": 8}, "quanto has no Conv1D"),
    ],
)
def test_settings_that_quanto_lacks_are_refused(family, settings, message, float_checkpoint, tmp_path):
    with pytest.raises(ValueError, match=message):
        quantize(float_checkpoint(family), tmp_path / "out", **settings)
    assert not (tmp_path / "out").exists()


@needs_quanto
def test_a_quanto_checkpoint_loads_with_quanto(float_checkpoint, tmp_path):
    from optimum.quanto.models.transformers_models import QuantizedTransformersModel

    class QuantizedClassifier(QuantizedTransformersModel):
        auto_class = AutoModelForImageClassification

    model = quantize(float_checkpoint("resnet"), tmp_path / "out", bits=8)
    loaded = QuantizedClassifier.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        expected = model(**inputs("resnet")).logits
        assert torch.equal(loaded._wrapped(**inputs("resnet")).logits, expected)
        floats = build("resnet")(**inputs("resnet")).logits
    torch.testing.assert_close(expected, floats, rtol=0.1, atol=0.1)
