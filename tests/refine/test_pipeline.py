"""Steps of refinement through the quantizer: what is saved, what is refused, and in which order."""

import pytest
import torch
from refine_models import build, images
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, GPT2Config, GPT2LMHeadModel

from hf_r2 import R2QuantizationConfig, R2Quantizer, decode
from hf_r2.quantization import compress
from hf_r2.refine import REFINEMENTS, adaptive_rounding, equalize, in_order
from hf_r2.report import Manifest
from hf_r2.report.card import build_card
from hf_r2.selection import output_first

COMBINATIONS = [
    ["equalize"],
    ["absorb_bias"],
    ["adaround"],
    ["compensate"],
    ["bias_correction"],
    ["batch_norm"],
    ["equalize", "absorb_bias", "adaround", "bias_correction", "batch_norm"],
]


@pytest.fixture(autouse=True)
def few_iterations(monkeypatch):
    monkeypatch.setattr(adaptive_rounding, "_ITERATIONS", 20)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("float")
    build("resnet").save_pretrained(directory)
    return directory


def quantize(source, target, refine, batches=None, **settings):
    config = R2QuantizationConfig(**{"bits": 3, **settings}, refine=refine)
    return R2Quantizer.from_pretrained(source).quantize(target, config, batches)


def assert_same_state(model, other):
    states = model.state_dict(), other.state_dict()
    assert states[0].keys() == states[1].keys()
    assert not [name for name, tensor in states[0].items() if not torch.equal(tensor, states[1][name])]


@pytest.mark.parametrize("refine", COMBINATIONS, ids="+".join)
def test_a_refined_checkpoint_loads_bit_equal(refine, source, tmp_path):
    model = quantize(source, tmp_path / "out", refine, images())
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert_same_state(model, loaded)
    assert loaded.config.quantization_config.refine == refine
    encoded = model.hf_quantizer.encoded
    for name, (layer, attribute) in model.hf_quantizer.selection(model).items():
        assert torch.equal(output_first(layer, getattr(layer, attribute)), decode(encoded[name]))
    plain = quantize(source, tmp_path / "plain", [])
    assert any(not torch.equal(tensor, plain.state_dict()[name]) for name, tensor in model.state_dict().items())
    loaded.save_pretrained(tmp_path / "again")
    again, first = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("again", "out"))
    assert again == first


def test_a_language_model_is_compensated_with_any_codec(tmp_path):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=32, n_positions=16, n_embd=8, n_layer=2, n_head=2)
    GPT2LMHeadModel(config).save_pretrained(tmp_path / "float")
    batches = [{"input_ids": torch.randint(32, (4, 12))} for _ in range(3)]
    overrides = {
        "transformer.h.0.attn*": {"method": "palette", "bits": 2},
        "transformer.h.1.attn*": {"method": "least_squares", "bits": 2},
        "transformer.wte*": {"bits": 8},
    }
    settings = {"overrides": overrides, "include": ["*.weight"], "skip": ["transformer.wpe*"]}
    model = quantize(tmp_path / "float", tmp_path / "out", ["compensate", "bias_correction"], batches, **settings)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert_same_state(model, loaded)
    methods = {encoded.settings.method for encoded in model.hf_quantizer.encoded.values()}
    assert methods == {"uniform", "palette", "least_squares"}


def test_batches_may_come_from_a_generator(source, tmp_path):
    steps = ["adaround", "bias_correction", "batch_norm"]
    listed = quantize(source, tmp_path / "listed", steps, images())
    drawn = quantize(source, tmp_path / "drawn", steps, (batch for batch in images()))
    assert_same_state(listed, drawn)


def test_steps_without_data_work_in_from_pretrained_and_compress(source, tmp_path):
    config = R2QuantizationConfig(bits=4, refine=["equalize", "absorb_bias"])
    expected = quantize(source, tmp_path / "out", config.refine, bits=4)
    loaded = AutoModelForImageClassification.from_pretrained(source, quantization_config=config)
    assert_same_state(loaded, expected)
    assert_same_state(compress(build("resnet"), config), expected)


@pytest.mark.parametrize("step", [step for step, needs_data in REFINEMENTS.items() if needs_data])
def test_steps_that_need_data_are_refused_without(step, source, tmp_path):
    config = R2QuantizationConfig(refine=["equalize", step])
    message = rf"refine=\['{step}'\] needs calibration data: use R2Quantizer.*or remove it from refine"
    with pytest.raises(ValueError, match=message):
        AutoModelForImageClassification.from_pretrained(source, quantization_config=config)
    with pytest.raises(ValueError, match=message):
        compress(build("resnet"), config)
    with pytest.raises(ValueError, match=rf"refine=\['{step}'\] needs a calibration_dataset"):
        quantize(source, tmp_path / "out", config.refine)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [step for step, needs_data in REFINEMENTS.items() if needs_data])
def test_empty_data_is_refused(step, source, tmp_path):
    with pytest.raises(ValueError, match=r"calibration data"):
        quantize(source, tmp_path / "out", [step], [])
    assert not (tmp_path / "out").exists()


def test_the_manifest_describes_the_equalized_weights(source, tmp_path):
    quantize(source, tmp_path / "out", ["equalize"])
    equalized = build("resnet")
    equalize(equalized)
    for facts in Manifest.load(tmp_path / "out").last("quantize")["weights"]:
        assert facts["max"] == pytest.approx(equalized.get_parameter(facts["name"]).max().item())
        assert facts["compressed_sqnr"] > 0


def test_the_card_names_the_steps(source, tmp_path):
    quantize(source, tmp_path / "out", ["bias_correction", "compensate"], images())
    card = str(build_card(Manifest.load(tmp_path / "out")))
    assert "error-compensated rounding" in card
    assert "bias correction" in card


def test_steps_have_one_order():
    assert in_order(COMBINATIONS[-1][::-1]) == COMBINATIONS[-1]
    assert in_order([]) == []
    with pytest.raises(ValueError, match="keep one of them"):
        in_order(["adaround", "compensate"])
    with pytest.raises(ValueError, match="unknown refinement 'gptq'"):
        in_order(["gptq"])
