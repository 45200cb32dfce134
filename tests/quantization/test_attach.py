"""Compression-aware training in bare loops: what is trained, evaluated, finalized, saved and reloaded is one model."""

import pytest
import torch
from checkpoint_models import FAMILIES, build, inputs, load, logits
from safetensors.torch import load_file
from torch.nn.utils import parametrize

from hf_r2 import R2QuantizationConfig, RangeLoss, RangeProjection, attach, finalize, select_weights, weight_statistics
from hf_r2.quantization import attached, compress, detach

UNTIED = [family for family in FAMILIES if family != "gpt2"]
BINARY = {"method": "least_squares", "aware": "least_squares"}
UNIFORM = {"method": "uniform", "bits": 2, "grain": "channel"}
SETTINGS = {
    "1 bit": {"bits": 1, "grain": "tensor"},
    "channels": {"bits": 2, "grain": "channel"},
    "groups": {"bits": 2, "grain": 5},
    "vectors": {"bits": 4, "grain": "tensor", "cluster_dim": 4},
    "binary": {**BINARY, "bits": 1, "grain": "channel"},
    "binary, 2 bits": {**BINARY, "bits": 2, "grain": 5},
    "ternary": {**BINARY, "bits": 2, "basis": "ternary"},
    "refined": {**BINARY, "bits": 3},
    "binary, inputs": {**BINARY, "bits": 1, "activations": {"bits": 2}},
    "palettes, averaged inputs": {"activations": {"bits": 3, "moving_average": "eval_only"}},
    "lsq": {**UNIFORM, "aware": "lsq", "grain": 5},
    "lsq, 1 bit": {**UNIFORM, "aware": "lsq", "bits": 1},
    "lsq, ternary": {**UNIFORM, "aware": "lsq", "grid": "restricted", "grain": "tensor"},
    "lsq, inputs": {**UNIFORM, "aware": "lsq", "activations": {"method": "lsq", "bits": 2}},
    "ewgs, inputs": {**UNIFORM, "aware": "ewgs", "grain": "tensor", "activations": {"method": "ewgs", "bits": 2}},
    "ewgs, 1 bit": {**UNIFORM, "aware": "ewgs", "bits": 1, "aware_options": {"delta": 0.1}},
    "dorefa, inputs": {**UNIFORM, "aware": "dorefa", "activations": {"method": "dorefa", "bits": 2}},
    "dorefa, 1 bit": {**UNIFORM, "aware": "dorefa", "bits": 1, "activations": {"method": "dorefa", "bits": 4}},
    "pact": {**UNIFORM, "aware": "pact", "bits": 2, "activations": {"method": "pact", "bits": 4}},
    "lsq, static inputs": {**UNIFORM, "aware": "lsq", "activations": {"method": "uniform", "range": "static"}},
    "palettes, tokens": {"activations": {"method": "uniform", "bits": 4, "grain": "token", "symmetric": True}},
}


def dkm(**settings):
    return R2QuantizationConfig(**{"method": "palette", "aware": "dkm", "bits": 2, "grain": "tensor", **settings})


def train(family, model, steps=3):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        model(**inputs(family)).logits.square().mean().backward()
        optimizer.step()


def latent(model):
    return {name: module.weight.detach().clone() for name, (module, _) in select_weights(model).items()}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("family", [*UNTIED, "gpt2"])
def test_evaluated_finalized_saved_and_reloaded_models_are_one(family, settings, tmp_path):
    model = attach(build(family), dkm(**settings))
    train(family, model)
    evaluated = logits(model.eval(), family)
    weights = {name: module.base_layer.weight.clone() for name, (module, _) in select_weights(model).items()}
    finalize(model)
    assert not any(map(parametrize.is_parametrized, model.modules()))
    for name, weight in weights.items():
        assert torch.equal(model.get_parameter(name), weight)
    assert torch.equal(logits(model, family), evaluated)
    model.save_pretrained(tmp_path)
    reloaded = load(family, tmp_path)
    assert torch.equal(logits(reloaded.eval(), family), evaluated)
    assert reloaded.config.quantization_config == model.config.quantization_config


def test_the_latent_weights_train():
    model = attach(build("resnet"), dkm())
    before = latent(model)
    train("resnet", model)
    assert all(not torch.equal(weight, before[name]) for name, weight in latent(model).items())


def test_weights_settle_on_their_palette():
    model = attach(build("resnet"), dkm(bits=1))
    train("resnet", model, steps=2)
    for module, step in attached(model).values():
        assert len(step.eval()(module.weight).unique()) == 2


def test_every_weight_has_its_own_settings():
    overrides = {
        "*embedder*": {"bits": 4},
        "classifier*": {"method": "uniform", "bits": 8},
        "*encoder*": {"cluster_dim": 2},
    }
    model = attach(build("resnet"), dkm(overrides=overrides))
    train("resnet", model)
    evaluated = logits(model.eval(), "resnet")
    finalize(model)
    settings = {name: encoded.settings for name, encoded in model.hf_quantizer.encoded.items()}
    assert {s.bits for name, s in settings.items() if "embedder" in name} == {4}
    assert {s.cluster_dim for name, s in settings.items() if "encoder" in name} == {2}
    assert {s.method for name, s in settings.items() if "classifier" in name} == {"uniform"}
    assert torch.equal(logits(model, "resnet"), evaluated)


def test_an_untied_embedding_is_trained_when_it_is_included():
    model = attach(build("bert"), dkm(include=["*word_embeddings*", "*query*"], bits=3))
    train("bert", model)
    finalize(model)
    table = model.get_input_embeddings().weight
    assert len(table.unique()) <= 8


def test_a_state_dict_is_that_of_the_float_model_with_centroids_beside_it(tmp_path):
    model = attach(build("resnet"), dkm())
    train("resnet", model)
    weights, state = latent(model), model.state_dict()
    plain = build("resnet").state_dict()
    assert plain.keys() <= state.keys()
    trained = {f"{name}_{kind}" for name in weights for kind in ("centroids", "masses")}
    assert state.keys() - plain.keys() == trained
    for name, weight in weights.items():
        assert torch.equal(state[name], weight)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == state.keys()
    assert torch.equal(load("resnet", tmp_path).classifier[1].weight, weights["classifier.1.weight"])


RESUMED = [
    "channels",
    "vectors",
    "binary, 2 bits",
    "lsq, inputs",
    "ewgs, inputs",
    "dorefa, 1 bit",
    "lsq, static inputs",
]


@pytest.mark.parametrize("settings", [{}, *(SETTINGS[name] for name in RESUMED)], ids=["dkm", *RESUMED])
def test_a_state_dict_resumes_bit_for_bit(settings):
    straight, resumed = (attach(build("resnet"), dkm(**settings)) for _ in range(2))
    train("resnet", straight, steps=2)
    resumed.load_state_dict(straight.state_dict())
    for model in (straight, resumed):
        train("resnet", model, steps=2)
    for name, tensor in straight.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor)


def test_the_optimizer_goes_on_with_the_parameters_it_had():
    model = build("resnet")
    before = list(model.parameters())
    attach(model, dkm())
    assert {id(parameter) for parameter in model.parameters()} == {id(parameter) for parameter in before}


def test_range_restriction_and_statistics_see_the_latent_weights():
    model = build("resnet")
    statistics = weight_statistics(model)
    attach(model, dkm(bits=1))
    assert weight_statistics(model) == statistics
    name = "classifier.1.weight"
    loss = RangeLoss(model, include=[name])
    loss.measure()
    loss.accumulate_grad_()
    original = model.classifier[1].parametrizations.weight.original
    assert original.grad.abs().sum() == 1
    RangeProjection(model, "clip", clip=1.2, include=[name]).step()
    assert original.abs().max() < statistics[-1].max


def test_a_detached_model_is_the_float_one_again():
    model = attach(build("gpt2"), dkm(grain="channel"))
    plain = build("gpt2").state_dict()
    detach(model)
    assert not attached(model)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == {
        name: tensor.shape for name, tensor in plain.items()
    }
    compress(model, dkm())


def test_a_detached_model_has_float_inputs_again():
    model = build("resnet").eval()
    plain = logits(model, "resnet")
    attach(model, dkm(activations={"bits": 1, "moving_average": "eval_only"}))
    train("resnet", model, steps=0)
    detach(model.eval())
    assert torch.equal(logits(model, "resnet"), plain)
    assert model.state_dict().keys() == build("resnet").state_dict().keys()


def test_mistakes_are_refused_before_anything_changes():
    model = build("gpt2")
    with pytest.raises(ValueError, match="names no compression-aware method: set aware to 'dkm'"):
        attach(model, R2QuantizationConfig("palette"))
    with pytest.raises(ValueError, match=r"wte\.weight is tied .* put it into skip"):
        attach(model, dkm(include=["*"]))
    with pytest.raises(ValueError, match="matches no weight"):
        attach(model, dkm(overrides={"clasifier*": {"bits": 8}}))
    with pytest.raises(ValueError, match="matches no weight"):
        attach(build("resnet"), dkm(activations={"skip": ["clasifier*"]}))
    with pytest.raises(ValueError, match=r"c_attn\.weight has grid=full, which EWGS does not train"):
        attach(model, dkm(**{**UNIFORM, "aware": "ewgs", "grid": "full"}))
    assert not any(map(parametrize.is_parametrized, model.modules()))
    with pytest.raises(ValueError, match=r"attach\(model, config\) first"):
        finalize(model)
    attach(model, dkm(), start=False)
    with pytest.raises(ValueError, match="compression has not begun"):
        finalize(model)
    with pytest.raises(ValueError, match="finalize it first"):
        attach(model, dkm())


@pytest.mark.parametrize(("aware", "bits", "grid"), [("lsq", 2, "full"), ("lsq", 1, "midrise"), ("ewgs", 3, "midrise")])
def test_the_grid_of_a_method_is_its_default(aware, bits, grid):
    config = R2QuantizationConfig(bits=bits, aware=aware)
    assert config.grid == grid
    assert R2QuantizationConfig(**config.to_dict()) == config
    assert R2QuantizationConfig(bits=2, aware="lsq", grid="restricted").grid == "restricted"


@pytest.mark.parametrize("settings", [SETTINGS["lsq, inputs"], SETTINGS["ewgs, inputs"]], ids=["lsq", "ewgs"])
def test_what_is_learned_trains_and_is_stored(settings):
    model = attach(build("resnet"), dkm(**settings))
    learned = {name: p for name, p in model.named_parameters() if ".weight.0." in name or "input_quantizer" in name}
    train("resnet", model, steps=1)
    before = {name: parameter.detach().clone() for name, parameter in learned.items()}
    train("resnet", model)
    moved = {name for name, parameter in learned.items() if not torch.equal(parameter, before[name])}
    # The scale of a weight in front of a batch norm changes nothing, and has next to no gradient
    assert all(name.endswith("output") for name in learned.keys() - moved)
    scales = {name: step.encoded(layer.weight).codebook["scale"] for name, (layer, step) in attached(model).items()}
    finalize(model)
    for name, scale in scales.items():
        assert torch.equal(model.hf_quantizer.encoded[name].codebook["scale"], scale)


@pytest.mark.parametrize("name", ["lsq, inputs", "ewgs, inputs", "dorefa, 1 bit", "lsq, static inputs"])
def test_a_half_precision_model_reloads_with_what_it_learned_in_float32(name, tmp_path):
    model = attach(build("resnet").to(torch.bfloat16), dkm(**SETTINGS[name])).train()
    batch = {"pixel_values": inputs("resnet")["pixel_values"].to(torch.bfloat16)}
    model(**batch).logits.float().square().mean().backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()
    evaluated = logits(model.eval(), "resnet")
    finalize(model).save_pretrained(tmp_path)
    reloaded = load("resnet", tmp_path).eval()
    assert reloaded.dtype == torch.bfloat16
    assert torch.equal(logits(reloaded, "resnet"), evaluated)


def test_the_first_and_the_last_layer_have_a_policy_of_their_own():
    first, last = "resnet.embedder.embedder.convolution.weight", "classifier.1.weight"
    overrides = {first: {"bits": 8}, last: {"bits": 8}}
    settings = {**SETTINGS["lsq, inputs"], "overrides": overrides, "activations": {"method": "lsq", "skip": [first]}}
    model = attach(build("resnet"), dkm(**settings))
    train("resnet", model)
    finalize(model)
    bits = {name: encoded.settings.bits for name, encoded in model.hf_quantizer.encoded.items()}
    assert {name for name, each in bits.items() if each == 8} == {first, last}
    assert not hasattr(model.resnet.embedder.embedder.convolution, "input_quantizer")
    assert hasattr(model.classifier[1], "input_quantizer")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "uniform", "aware": "dkm"}, "aware='dkm' trains the codec 'palette': set method"),
        ({"method": "palette", "aware": "least_squares"}, "trains the codec 'least_squares'"),
        ({**BINARY, "aware_options": {"iterations": 3}}, "'least_squares' has none"),
        ({"method": "palette", "aware": "lsq"}, "aware='lsq' trains the codec 'uniform'"),
        ({"aware": "ewgs", "aware_options": {"deltas": 3}}, "did you mean 'delta'"),
        ({"aware": "ewgs", "aware_options": {"delta": -1}}, "delta=-1"),
        ({"aware": "ewgs", "aware_options": {"delta": "trace"}}, "delta='trace' is neither"),
        ({"aware": "pact"}, "add activations="),
        ({"activations": {"method": "lsg"}}, "unknown activations method 'lsg'"),
        ({"activations": {"bit": 2}}, "did you mean 'bits'"),
        ({"activations": {"bits": 9}}, "bits=9"),
        ({"method": "palette", "aware": "dmk"}, "unknown method aware='dmk'"),
        ({"method": "palette", "aware_options": {"iterations": 3}}, "without a method"),
        ({"method": "palette", "aware": "dkm", "aware_options": {"iteration": 3}}, "did you mean 'iterations'"),
        ({"method": "palette", "aware": "dkm", "aware_options": {"iterations": 0}}, "iterations=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        R2QuantizationConfig(**settings)
