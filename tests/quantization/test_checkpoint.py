"""Compression on the fly, saving, and loading in the same process."""

import json

import pytest
import torch
from checkpoint_models import (
    CODECS,
    FAMILIES,
    GRAINS,
    assert_same_tensors,
    build,
    load,
    logits,
    mixed,
    random_model,
    selected,
    state,
)
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForAudioClassification, AutoModelForImageClassification, Dinov2Config, Wav2Vec2Config

from hf_r2 import R2QuantizationConfig, R2Quantizer, decode, encode
from hf_r2.codecs import METHODS, CodecSettings
from hf_r2.codecs.settings import BASES, GRIDS, RANGES
from hf_r2.quantization import compress

INCLUDE_ALL = {"method": "palette", "bits": 2, "include": ["*"]}
VECTORS = {"method": "palette", "bits": 4, "cluster_dim": 4}


def codes_and_codebooks(model):
    encoded = model.hf_quantizer.encoded.items()
    return {f"{name} {key}": tensor for name, e in encoded for key, tensor in {"codes": e.codes, **e.codebook}.items()}


# --- on the fly -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_loading_a_float_checkpoint_with_a_config_compresses_the_selected_weights_only(family, float_checkpoint):
    config = R2QuantizationConfig(**mixed(family))
    floats = build(family)
    expected = {name: decode(encode(weight, config, name)) for name, weight in selected(floats).items()}
    model = load(family, float_checkpoint(family), quantization_config=config)
    assert_same_tensors(selected(model), expected)
    rest = {name: tensor for name, tensor in state(floats).items() if name not in expected}
    assert rest
    assert_same_tensors({name: tensor for name, tensor in state(model).items() if name not in expected}, rest)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_model_reloads_with_bit_equal_state_and_logits(family, float_checkpoint, tmp_path):
    model = load(family, float_checkpoint(family), quantization_config=R2QuantizationConfig(**mixed(family)))
    model.save_pretrained(tmp_path)
    reloaded = load(family, tmp_path)
    assert_same_tensors(state(reloaded), state(model))
    assert_same_tensors(codes_and_codebooks(reloaded), codes_and_codebooks(model))
    assert torch.equal(logits(reloaded, family), logits(model, family))
    assert not reloaded.training


def test_every_codec_and_grid_has_a_row_in_these_tests():
    rows = [CodecSettings(**row) for row in CODECS.values()]
    assert {row.method for row in rows} == set(METHODS)
    assert {row.grid for row in rows if row.symmetric} == set(GRIDS)
    assert {row.range for row in rows if row.method == "uniform"} == set(RANGES)
    assert {row.symmetric for row in rows if row.method == "uniform"} == {True, False}
    assert {row.basis for row in rows if row.method == "least_squares"} == set(BASES)
    assert {row.cluster_dim > 1 for row in rows if row.method == "palette"} == {True, False}


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_one_quantize_function_gives_the_same_bits_everywhere(family, codec, grain, float_checkpoint, tmp_path):
    settings = {**CODECS[codec], "grain": grain}
    source = float_checkpoint(family)
    on_tensors = {
        name: decode(encode(weight, R2QuantizationConfig(**settings), name))
        for name, weight in selected(build(family)).items()
    }
    on_the_fly = load(family, source, quantization_config=R2QuantizationConfig(**settings))
    on_the_fly.save_pretrained(tmp_path / "on_the_fly")
    R2Quantizer.from_pretrained(source).quantize(tmp_path / "quantizer", R2QuantizationConfig(**settings))
    assert_same_tensors(selected(on_the_fly), on_tensors)
    assert_same_tensors(selected(load(family, tmp_path / "on_the_fly")), on_tensors)
    assert_same_tensors(selected(load(family, tmp_path / "quantizer")), on_tensors)


@pytest.mark.parametrize("bits", range(1, 9))
def test_every_width_of_code_reloads_bit_equal(bits, compressed_checkpoint):
    directory = compressed_checkpoint("resnet", method="palette", bits=bits, grain="tensor")
    weights = selected(load("resnet", directory))
    expected = {
        name: decode(encode(weight, R2QuantizationConfig("palette", bits, "tensor")))
        for name, weight in selected(build("resnet")).items()
    }
    assert_same_tensors(weights, expected)
    assert all(weight.unique().numel() <= 2**bits for weight in weights.values())


@pytest.mark.parametrize("grain", GRAINS)
@pytest.mark.parametrize(("bits", "cluster_dim"), [(1, 2), (2, 64), (4, 4), (8, 7), (8, 2)])
@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_vectors_of_every_length_reload_bit_equal(family, bits, cluster_dim, grain, compressed_checkpoint):
    settings = {"method": "palette", "bits": bits, "cluster_dim": cluster_dim, "grain": grain, "include": ["*"]}
    weights = selected(load(family, compressed_checkpoint(family, **settings)), include=["*"])
    config = R2QuantizationConfig(**settings)
    expected = {name: decode(encode(weight, config)) for name, weight in selected(build(family), include=["*"]).items()}
    assert_same_tensors(weights, expected)


def test_compress_does_to_a_model_in_memory_what_loading_with_a_config_does(float_checkpoint):
    settings = mixed("resnet")
    in_memory = compress(build("resnet"), R2QuantizationConfig(**settings))
    loaded = load("resnet", float_checkpoint("resnet"), quantization_config=R2QuantizationConfig(**settings))
    assert_same_tensors(state(in_memory), state(loaded))


def test_compressing_a_compressed_model_is_refused(compressed_checkpoint):
    model = load("resnet", compressed_checkpoint("resnet"))
    with pytest.raises(ValueError, match="already quantized; load the float checkpoint"):
        compress(model, R2QuantizationConfig())


def test_an_override_that_matches_no_weight_is_refused_with_near_names(float_checkpoint):
    config = R2QuantizationConfig(overrides={"clasifier.1.weight": {"bits": 8}})
    with pytest.raises(ValueError, match=r"matches no weight; near names: \['classifier.1.weight'"):
        load("resnet", float_checkpoint("resnet"), quantization_config=config)


def test_a_weight_with_nan_is_refused_by_name(tmp_path):
    model = build("resnet")
    model.classifier[1].weight.data[0, 0] = float("nan")
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"classifier\.1\.weight.* NaN"):
        load("resnet", tmp_path, quantization_config=R2QuantizationConfig())


# --- on disk ----------------------------------------------------------------------------------------------------------


def test_the_file_holds_flat_codes_under_the_names_of_the_weights_with_codebooks_beside_them(compressed_checkpoint):
    tensors = load_file(compressed_checkpoint("resnet", method="palette", bits=3) / "model.safetensors")
    for name, weight in selected(build("resnet")).items():
        assert tensors[name].dtype == torch.uint8
        assert tensors[name].shape == ((3 * weight.numel() + 7) // 8,)
        assert tensors[f"{name}_lut"].shape == (len(weight), 8)


def test_the_file_holds_a_code_for_every_vector_and_tables_of_vectors(compressed_checkpoint):
    tensors = load_file(compressed_checkpoint("resnet", **VECTORS) / "model.safetensors")
    for name, weight in selected(build("resnet")).items():
        codes = len(weight) * -(-weight[0].numel() // 4)
        assert tensors[name].shape == ((4 * codes + 7) // 8,)
        assert (tensors[f"{name}_lut"].shape, tensors[f"{name}_lut"].dtype) == ((len(weight), 16, 4), torch.float32)


def test_palettes_of_single_values_are_written_alike_with_and_without_their_length(compressed_checkpoint):
    plain = compressed_checkpoint("resnet", method="palette", bits=2)
    named = compressed_checkpoint("resnet", method="palette", bits=2, cluster_dim=1)
    for file in ("model.safetensors", "config.json"):
        assert (plain / file).read_bytes() == (named / file).read_bytes(), file


@pytest.mark.parametrize("family", FAMILIES)
def test_saving_again_writes_identical_bytes(family, compressed_checkpoint, tmp_path):
    first = compressed_checkpoint(family, **mixed(family))
    load(family, first).save_pretrained(tmp_path)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / file).read_bytes() == (first / file).read_bytes(), file


def test_saving_twice_in_the_same_process_writes_identical_bytes(float_checkpoint, tmp_path):
    config = R2QuantizationConfig(**mixed("resnet"))
    model = load("resnet", float_checkpoint("resnet"), quantization_config=config)
    for directory in ("first", "second"):
        model.save_pretrained(tmp_path / directory)
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes(), file


def test_a_loaded_model_can_be_saved_over_the_checkpoint_it_came_from(float_checkpoint, tmp_path):
    load("gpt2", float_checkpoint("gpt2"), quantization_config=R2QuantizationConfig(**INCLUDE_ALL)).save_pretrained(
        tmp_path
    )
    model = load("gpt2", tmp_path)
    before, content = state(model), (tmp_path / "model.safetensors").read_bytes()
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == content
    assert_same_tensors(state(model), before)
    assert_same_tensors(state(load("gpt2", tmp_path)), before)


@pytest.mark.parametrize("family", ["resnet", "gpt2", "vit"])
def test_a_checkpoint_in_shards_reloads_bit_equal(family, float_checkpoint, tmp_path):
    model = load(family, float_checkpoint(family), quantization_config=R2QuantizationConfig(**mixed(family)))
    model.save_pretrained(tmp_path / "shards", max_shard_size=400)
    assert len(list((tmp_path / "shards").glob("model-*.safetensors"))) > 2
    reloaded = load(family, tmp_path / "shards")
    assert_same_tensors(state(reloaded), state(model))
    reloaded.save_pretrained(tmp_path / "one")
    assert_same_tensors(state(load(family, tmp_path / "one")), state(model))


@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_a_checkpoint_loads_through_a_device_map(family, compressed_checkpoint):
    directory = compressed_checkpoint(family, **mixed(family))
    assert_same_tensors(state(load(family, directory, device_map="cpu")), state(load(family, directory)))


def test_one_config_object_serves_several_models(tmp_path):
    config = R2QuantizationConfig("palette", bits=2)
    models = {seed: compress(build("resnet", seed), config) for seed in (0, 1)}
    for seed, model in models.items():
        model.save_pretrained(tmp_path / str(seed))
    for seed, model in models.items():
        assert_same_tensors(state(load("resnet", tmp_path / str(seed))), state(model))


def test_saving_a_model_leaves_the_config_object_that_made_it_alone(float_checkpoint, tmp_path):
    config = R2QuantizationConfig("palette", bits=2)
    before = config.to_dict()
    load("resnet", float_checkpoint("resnet"), quantization_config=config).save_pretrained(tmp_path)
    assert config.to_dict() == before


# --- half precision ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["resnet", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_loads_in_half_precision_with_its_codes_and_codebooks_unchanged(
    family, dtype, compressed_checkpoint, tmp_path
):
    directory = compressed_checkpoint(family, **mixed(family))
    full, half = load(family, directory), load(family, directory, dtype=dtype)
    assert_same_tensors(codes_and_codebooks(half), codes_and_codebooks(full))
    assert_same_tensors(selected(half), {name: weight.to(dtype) for name, weight in selected(full).items()})
    half.save_pretrained(tmp_path)
    on_disk, original = load_file(tmp_path / "model.safetensors"), load_file(directory / "model.safetensors")
    for name in half.hf_quantizer.encoded:
        keys = [key for key in original if key == name or key.startswith(f"{name}_")]
        assert_same_tensors({key: on_disk[key] for key in keys}, {key: original[key] for key in keys})
    reloaded = load(family, tmp_path)
    assert reloaded.dtype == dtype
    assert_same_tensors(state(reloaded), state(half))
    assert torch.equal(logits(reloaded, family), logits(half, family))


@pytest.mark.parametrize("family", ["resnet", "gpt2"])
def test_a_model_compressed_in_half_precision_reloads_bit_equal(family, float_checkpoint, tmp_path):
    config = R2QuantizationConfig(**mixed(family))
    model = load(family, float_checkpoint(family), quantization_config=config, dtype=torch.bfloat16)
    expected = {
        name: decode(encode(weight, config, name))
        for name, weight in selected(build(family).to(torch.bfloat16)).items()
    }
    assert_same_tensors(selected(model), expected)
    model.save_pretrained(tmp_path)
    reloaded = load(family, tmp_path)
    assert_same_tensors(state(reloaded), state(model))
    assert torch.equal(logits(reloaded, family), logits(model, family))


def test_a_model_cast_after_loading_saves_and_reloads_bit_equal(compressed_checkpoint, tmp_path):
    model = load("resnet", compressed_checkpoint("resnet", **mixed("resnet"))).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert_same_tensors(state(load("resnet", tmp_path)), state(model))


# --- embeddings and tied weights --------------------------------------------------------------------------------------


def test_an_embedding_is_compressed_only_on_request(compressed_checkpoint):
    embedding = "bert.embeddings.word_embeddings.weight"
    plain = load("bert", compressed_checkpoint("bert", method="palette", bits=2))
    asked = load("bert", compressed_checkpoint("bert", **INCLUDE_ALL))
    floats = build("bert").get_parameter(embedding)
    assert embedding not in plain.hf_quantizer.encoded
    assert torch.equal(plain.get_parameter(embedding), floats)
    config = R2QuantizationConfig(**INCLUDE_ALL)
    assert torch.equal(asked.get_parameter(embedding), decode(encode(floats, config, embedding)))


@pytest.mark.parametrize(
    "settings",
    [{"method": "palette", "bits": 2}, INCLUDE_ALL, {**VECTORS, "grain": "tensor", "include": ["*"]}],
    ids=["untouched", "compressed", "vectors"],
)
def test_a_tied_embedding_stays_tied_through_saving_and_loading(settings, float_checkpoint, tmp_path):
    model = load("gpt2", float_checkpoint("gpt2"), quantization_config=R2QuantizationConfig(**settings))
    model.save_pretrained(tmp_path)
    reloaded = load("gpt2", tmp_path)
    for candidate in (model, reloaded):
        assert candidate.lm_head.weight is candidate.transformer.wte.weight
    compressed = "include" in settings
    assert ("transformer.wte.weight" in model.hf_quantizer.encoded) == compressed
    assert torch.equal(model.lm_head.weight, build("gpt2").lm_head.weight) != compressed
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    assert_same_tensors(state(reloaded), state(model))
    assert torch.equal(logits(reloaded, "gpt2"), logits(model, "gpt2"))


# --- weights changed after compression --------------------------------------------------------------------------------


def test_an_edited_weight_is_refused_by_name_and_the_old_checkpoint_still_loads(float_checkpoint, tmp_path):
    config = R2QuantizationConfig(**mixed("resnet"))
    model = load("resnet", float_checkpoint("resnet"), quantization_config=config)
    model.save_pretrained(tmp_path)
    before = state(model)
    model.classifier[1].weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"classifier\.1\.weight' was changed .* call `model.dequantize\(\)`"):
        model.save_pretrained(tmp_path)
    assert_same_tensors(state(load("resnet", tmp_path)), before)


def test_an_edited_conv1d_weight_and_an_edited_tied_weight_are_refused_by_name(compressed_checkpoint, tmp_path):
    directory = compressed_checkpoint("gpt2", **INCLUDE_ALL)
    model = load("gpt2", directory)
    model.transformer.h[0].mlp.c_fc.weight.data[0, 1] += 1e-3
    with pytest.raises(ValueError, match=r"transformer\.h\.0\.mlp\.c_fc\.weight"):
        model.save_pretrained(tmp_path)
    model = load("gpt2", directory)
    model.lm_head.weight.data[0, 0] += 1e-3
    with pytest.raises(ValueError, match=r"transformer\.wte\.weight"):
        model.save_pretrained(tmp_path)


def test_a_layer_replaced_after_compression_is_refused_by_name(compressed_checkpoint, tmp_path):
    model = load("resnet", compressed_checkpoint("resnet"))
    model.classifier[1] = nn.Linear(8, 5)
    with pytest.raises(ValueError, match=r"classifier\.1\.weight"):
        model.save_pretrained(tmp_path)


def test_a_layer_added_after_compression_is_refused_by_name(compressed_checkpoint, tmp_path):
    model = load("resnet", compressed_checkpoint("resnet"))
    model.extra_head = nn.Linear(8, 2)
    with pytest.raises(ValueError, match=r"extra_head\.weight"):
        model.save_pretrained(tmp_path)


def test_a_bias_may_change_without_a_new_compression(compressed_checkpoint, tmp_path):
    model = load("resnet", compressed_checkpoint("resnet"))
    model.classifier[1].bias.data += 1
    model.save_pretrained(tmp_path)
    assert_same_tensors(state(load("resnet", tmp_path)), state(model))


def test_a_dequantized_model_saves_as_a_plain_float_checkpoint(float_checkpoint, tmp_path):
    config = R2QuantizationConfig(**mixed("resnet"))
    model = load("resnet", float_checkpoint("resnet"), quantization_config=config)
    model.save_pretrained(tmp_path / "compressed")
    before = state(model)
    model = model.dequantize()
    model.save_pretrained(tmp_path / "float")
    assert "quantization_config" not in json.loads((tmp_path / "float/config.json").read_text())
    assert_same_tensors(load_file(tmp_path / "float/model.safetensors"), before)
    plain = load("resnet", tmp_path / "float")
    assert getattr(plain, "hf_quantizer", None) is None
    assert_same_tensors(state(plain), before)


def test_a_dequantized_model_can_be_edited_and_compressed_again(compressed_checkpoint, tmp_path):
    model = load("resnet", compressed_checkpoint("resnet")).dequantize()
    model.classifier[1].weight.data[0, 0] += 1e-3
    compress(model, R2QuantizationConfig("palette", bits=2)).save_pretrained(tmp_path)
    assert_same_tensors(state(load("resnet", tmp_path)), state(model))


# --- models whose files do not name their weights as the modules do ---------------------------------------------------


def test_a_weight_normed_layer_is_refused_by_name_and_the_rest_compresses_without_it(tmp_path):
    config = Wav2Vec2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        conv_dim=(8, 8),
        conv_stride=(5, 2),
        conv_kernel=(10, 3),
        num_conv_pos_embeddings=4,
        num_conv_pos_embedding_groups=2,
        classifier_proj_size=8,
    )
    model = random_model(config, AutoModelForAudioClassification)
    model.save_pretrained(tmp_path / "float")
    with pytest.raises(ValueError, match=r"pos_conv_embed\.conv\.weight.*skip"):
        AutoModelForAudioClassification.from_pretrained(tmp_path / "float", quantization_config=R2QuantizationConfig())
    settings = R2QuantizationConfig(skip=["*pos_conv_embed*"])
    model = AutoModelForAudioClassification.from_pretrained(tmp_path / "float", quantization_config=settings)
    model.save_pretrained(tmp_path / "compressed")
    reloaded = AutoModelForAudioClassification.from_pretrained(tmp_path / "compressed")
    assert_same_tensors(state(reloaded), state(model))


@pytest.mark.parametrize("overrides", [{}, {"*.up_proj.weight": {"bits": 4}}], ids=["alike", "different_bits"])
@pytest.mark.parametrize("grain", GRAINS)
def test_layers_that_the_file_stores_fused_reload_bit_equal(grain, overrides, tmp_path):
    config = Dinov2Config(
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=8,
        patch_size=4,
        use_swiglu_ffn=True,
        num_labels=3,
    )
    random_model(config, AutoModelForImageClassification).save_pretrained(tmp_path / "float")
    settings = R2QuantizationConfig(method="palette", bits=2, grain=grain, overrides=overrides)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "float", quantization_config=settings)
    model.save_pretrained(tmp_path / "compressed")
    reloaded = AutoModelForImageClassification.from_pretrained(tmp_path / "compressed")
    assert_same_tensors(state(reloaded), state(model))
