"""Weights that stay packed in memory: the same results and files, and no gradients."""

import pytest
import torch
from checkpoint_models import FAMILIES, assert_same_tensors, load, logits, mixed, random_model, selected, state
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_r2 import R2QuantizationConfig, decode, keep_packed
from hf_r2.quantization.packed import is_packed, keeps_packed

EVERYTHING = {"method": "palette", "bits": 2, "include": ["*"]}
PROMPT = torch.tensor([[3, 1, 4, 1, 5]])


def packed(family, directory, **options):
    with keep_packed():
        return load(family, directory, **options)


def packed_bytes(model):
    return sum(encoded.nbytes for encoded in model.hf_quantizer.encoded.values())


@pytest.fixture(scope="module", params=["tied", "untied"])
def llama(request, tmp_path_factory):
    """A causal language model of the Llama kind, embeddings and output layer compressed."""
    config = LlamaConfig(
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        vocab_size=32,
        eos_token_id=None,
        tie_word_embeddings=request.param == "tied",
    )
    directory = tmp_path_factory.mktemp(request.param)
    random_model(config, AutoModelForCausalLM).save_pretrained(directory / "float")
    settings = R2QuantizationConfig(method="uniform", bits=4, include=["*"], overrides={"*embed*": {"bits": 6}})
    model = AutoModelForCausalLM.from_pretrained(directory / "float", quantization_config=settings)
    model.save_pretrained(directory / "compressed")
    return request.param, directory / "compressed"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_packed_model_computes_bit_for_bit_what_a_decoded_one_does(family, compressed_checkpoint):
    directory = compressed_checkpoint(family, **mixed(family))
    model = packed(family, directory)
    assert all(is_packed(module) for module, _ in model.hf_quantizer.selection(model).values())
    assert_same_tensors(selected(model), selected(load(family, directory)))
    assert torch.equal(logits(model, family), logits(load(family, directory), family))


def test_it_holds_codes_and_no_decoded_weights(compressed_checkpoint):
    model = packed("gpt2", compressed_checkpoint("gpt2", **EVERYTHING))
    held = sum(tensor.nbytes for tensor in state(model).values())
    floats = sum(weight.nbytes for weight in selected(model, include=["*"]).values())
    assert held + packed_bytes(model) < 0.7 * floats
    assert not model.state_dict().keys() & model.hf_quantizer.encoded.keys()


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_saving_a_packed_model_writes_the_files_that_it_came_from(family, compressed_checkpoint, tmp_path):
    directory = compressed_checkpoint(family, **mixed(family))
    packed(family, directory).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (directory / file).read_bytes(), file


def test_compressing_while_loading_can_keep_packed_too(float_checkpoint, compressed_checkpoint, tmp_path):
    with keep_packed():
        model = load("gpt2", float_checkpoint("gpt2"), quantization_config=R2QuantizationConfig(**EVERYTHING))
    model.save_pretrained(tmp_path)
    expected = compressed_checkpoint("gpt2", **EVERYTHING) / "model.safetensors"
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()


@pytest.mark.parametrize("settings", [EVERYTHING, {"method": "palette", "bits": 2}], ids=["compressed", "float"])
def test_a_tied_output_layer_stays_tied(settings, compressed_checkpoint):
    model = packed("gpt2", compressed_checkpoint("gpt2", **settings))
    if "include" in settings:
        embedding, output = (layer.parametrizations["weight"][0] for layer in (model.transformer.wte, model.lm_head))
        assert embedding.encoded is output.encoded
    else:
        assert model.lm_head.weight is model.transformer.wte.weight


def test_half_precision_is_that_of_a_decoded_model(compressed_checkpoint):
    directory = compressed_checkpoint("gpt2", **EVERYTHING)
    expected = logits(load("gpt2", directory, dtype=torch.bfloat16), "gpt2")
    assert torch.equal(logits(packed("gpt2", directory, dtype=torch.bfloat16), "gpt2"), expected)
    cast = packed("gpt2", directory).to(torch.bfloat16)
    assert torch.equal(logits(cast, "gpt2"), expected)
    assert {t.dtype for e in cast.hf_quantizer.encoded.values() for t in e.codebook.values()} == {torch.float32}


def test_training_is_refused(compressed_checkpoint):
    model = packed("gpt2", compressed_checkpoint("gpt2", **EVERYTHING))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not model.hf_quantizer.is_trainable
    with pytest.raises(RuntimeError, match="does not require grad"):
        model(PROMPT, labels=PROMPT).loss.backward()


def test_dequantize_leaves_a_plain_float_model(compressed_checkpoint, tmp_path):
    directory = compressed_checkpoint("gpt2", **EVERYTHING)
    expected = load("gpt2", directory).dequantize()
    model = packed("gpt2", directory).dequantize()
    assert_same_tensors(state(model), state(expected))
    assert model.lm_head.weight is model.transformer.wte.weight
    model.save_pretrained(tmp_path)
    assert_same_tensors(state(load("gpt2", tmp_path)), state(expected))


def test_outside_of_the_block_weights_are_decoded(compressed_checkpoint):
    assert not keeps_packed()
    with pytest.raises(RuntimeError), keep_packed():
        assert keeps_packed()
        raise RuntimeError
    assert not keeps_packed()
    model = load("resnet", compressed_checkpoint("resnet"))
    assert not any(is_packed(module) for module in model.modules())


# --- language models with compressed embeddings -----------------------------------------------------------------------


def test_embeddings_and_output_layer_are_compressed_and_counted(llama):
    kind, directory = llama
    model = AutoModelForCausalLM.from_pretrained(directory)
    encoded = model.hf_quantizer.encoded
    assert encoded["model.embed_tokens.weight"].bits == 6
    assert ("lm_head.weight" in encoded) == (kind == "untied")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == (kind == "tied")
    assert encoded["model.embed_tokens.weight"].codebook["scale"].shape == (32,)
    assert torch.equal(model.model.embed_tokens.weight, decode(encoded["model.embed_tokens.weight"]))


def test_generation_is_the_same_packed_and_decoded(llama):
    _, directory = llama
    decoded = AutoModelForCausalLM.from_pretrained(directory)
    with keep_packed():
        kept = AutoModelForCausalLM.from_pretrained(directory, device_map="cpu")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    assert decoded.generate(PROMPT, **options).shape == (1, 11)
    assert torch.equal(decoded.generate(PROMPT, **options), kept.generate(PROMPT, **options))
    assert torch.equal(decoded(PROMPT).logits, kept(PROMPT).logits)
