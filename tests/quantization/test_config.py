import json

import pytest
import torch
from transformers import AutoConfig, PreTrainedConfig
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_r2 import R2QuantizationConfig, encode
from hf_r2.codecs import CodecSettings
from hf_r2.quantization.config import FORMAT_VERSION, QUANT_METHOD

NAMES = [
    "embeddings.weight",
    "encoder.0.attention.weight",
    "encoder.0.mlp.weight",
    "encoder.1.mlp.weight",
    "classifier.weight",
    None,
]
ROUND_TRIPS = [
    {},
    {"method": "palette", "bits": 1, "grain": 64},
    {"bits": 3, "symmetric": False, "range": "mse", "include": ["encoder.*"], "skip": ["*.1.*"], "min_numel": 100},
    {"grid": "midrise", "refine": ["batch_norm"], "sha256": {"model.safetensors": "ab", "codes": ["cd"]}},
    {"overrides": {"*": {"bits": 8}, "encoder.*": {"bits": 2}}},
    {"overrides": {"encoder.*": {"bits": 2}, "*": {"bits": 8}}},
    {"overrides": {"z*": {"bits": 3}, "*.mlp.*": {"method": "palette", "bits": 1}, "*.1.*": {"bits": 5}, "c*": {}}},
    {"overrides": [("z*", {"bits": 8}), ("*", {"grain": "tensor", "bits": 6}), ("a*", {"bits": 2})]},
    {"method": "palette", "overrides": {"*.mlp.*": {"method": "uniform", "symmetric": False}}},
    {"method": "palette", "cluster_dim": 4, "overrides": {"*.mlp.*": {"cluster_dim": 2}, "c*": {"cluster_dim": 1}}},
    {"overrides": {"*.mlp.*": {"method": "palette", "cluster_dim": 64}, "*.1.*": {"bits": 8}}},
    {"method": "least_squares", "bits": 2, "basis": "ternary", "overrides": {"c*": {"basis": "greedy", "bits": 5}}},
    {"range": "percentile", "percentile": 99.5, "overrides": {"c*": {"range": "mse"}, "*.1.*": {"percentile": 98}}},
    {"overrides": {"*.mlp.*": {"method": "least_squares", "bits": 1}, "*.1.*": {"grain": 16}}},
]


def through_json(config):
    return json.loads(json.dumps(config.to_dict(), sort_keys=True))


def settings_of(config):
    return [config.settings_for(name) for name in NAMES]


@pytest.mark.parametrize("given", ROUND_TRIPS)
def test_a_config_survives_json_with_sorted_keys(given):
    config = R2QuantizationConfig(**given)
    again = R2QuantizationConfig(**through_json(config))
    assert settings_of(again) == settings_of(config)
    assert again.overrides == config.overrides
    assert again.to_dict() == config.to_dict()
    for key in ("include", "skip", "min_numel", "refine", "sha256", "format_version"):
        assert (getattr(again, key) or None) == (getattr(config, key) or None)


@pytest.mark.parametrize("given", ROUND_TRIPS)
def test_transformers_reads_the_config_from_a_file(given, tmp_path):
    config = R2QuantizationConfig(**given)
    config.to_json_file(tmp_path / "quantization.json")
    read = AutoQuantizationConfig.from_dict(json.loads((tmp_path / "quantization.json").read_text()))
    assert isinstance(read, R2QuantizationConfig)
    assert settings_of(read) == settings_of(config)


def test_the_config_survives_inside_a_model_config(tmp_path):
    config = R2QuantizationConfig(**ROUND_TRIPS[6])
    model_config = AutoConfig.for_model("bert", hidden_size=8, num_attention_heads=1)
    model_config.quantization_config = config
    model_config.save_pretrained(tmp_path)
    read = AutoQuantizationConfig.from_dict(PreTrainedConfig.from_pretrained(tmp_path).quantization_config)
    assert settings_of(read) == settings_of(config)


def test_the_written_config_names_method_and_version_and_leaves_out_what_is_unset():
    content = through_json(R2QuantizationConfig(method="palette", bits=2))
    assert content == {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "method": "palette",
        "bits": 2,
        "grain": "channel",
    }


def test_the_length_of_vectors_is_written_unless_it_is_one():
    assert through_json(R2QuantizationConfig(method="palette", cluster_dim=2))["cluster_dim"] == 2
    assert "cluster_dim" not in through_json(R2QuantizationConfig(method="palette", cluster_dim=1))
    assert R2QuantizationConfig(method="palette").cluster_dim == 1
    assert R2QuantizationConfig().cluster_dim is None


def test_defaults_are_four_bit_uniform_channels():
    config = R2QuantizationConfig()
    assert config.settings_for("any.weight") == CodecSettings("uniform", 4, "channel")
    assert (config.method, config.bits, config.grain) == ("uniform", 4, "channel")
    assert (config.symmetric, config.grid, config.range) == (True, "restricted", "min_max")


def bits_of(config):
    return [config.settings_for(name).bits for name in NAMES]


@pytest.mark.parametrize("as_pairs", [False, True])
@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"classifier.weight": {"bits": 8}}, [4, 4, 4, 4, 8, 4]),
        ({"encoder.*": {"bits": 2}}, [4, 2, 2, 2, 4, 4]),
        ({"encoder.?.mlp.weight": {"bits": 3}}, [4, 4, 3, 3, 4, 4]),
        ({"encoder.[1-9].*": {"bits": 3}}, [4, 4, 4, 3, 4, 4]),
        ({"encoder": {"bits": 3}}, [4, 4, 4, 4, 4, 4]),
        ({"ENCODER.*": {"bits": 3}}, [4, 4, 4, 4, 4, 4]),
        ({"*": {"bits": 8}, "encoder.*": {"bits": 2}}, [8, 2, 2, 2, 8, 4]),
        ({"encoder.*": {"bits": 2}, "*": {"bits": 8}}, [8, 8, 8, 8, 8, 4]),
        ({"encoder.0.mlp.weight": {"bits": 5}, "*.mlp.*": {"bits": 6}}, [4, 4, 6, 6, 4, 4]),
    ],
)
def test_overrides_go_by_name_or_pattern_and_later_ones_win(overrides, expected, as_pairs):
    config = R2QuantizationConfig(overrides=list(overrides.items()) if as_pairs else overrides)
    assert bits_of(config) == expected


def test_overrides_that_match_the_same_weight_add_up():
    config = R2QuantizationConfig(overrides={"*": {"grain": 16}, "enc*": {"bits": 3}, "*.mlp.*": {"range": "mse"}})
    expected = CodecSettings("uniform", 3, 16, range="mse")
    assert config.settings_for("encoder.0.mlp.weight") == expected


def test_a_pattern_listed_twice_applies_both_times():
    config = R2QuantizationConfig(overrides=[("enc*", {"grain": 16}), ("*", {"bits": 2}), ("enc*", {"bits": 8})])
    assert config.settings_for("encoder.0.mlp.weight") == CodecSettings("uniform", 8, 16)
    assert config.settings_for("classifier.weight") == CodecSettings("uniform", 2)
    assert settings_of(R2QuantizationConfig(**through_json(config))) == settings_of(config)


@pytest.mark.parametrize(
    ("base", "override", "expected"),
    [
        ({"grid": "full", "range": "mse", "grain": 32}, {"method": "palette"}, CodecSettings("palette", 4, 32)),
        ({"symmetric": False}, {"method": "palette", "bits": 1}, CodecSettings("palette", 1)),
        ({"method": "palette", "bits": 2}, {"method": "uniform"}, CodecSettings("uniform", 2)),
        (
            {"method": "least_squares", "bits": 2, "basis": "ternary"},
            {"method": "palette"},
            CodecSettings("palette", 2),
        ),
        (
            {"method": "least_squares", "basis": "greedy"},
            {"bits": 7},
            CodecSettings("least_squares", 7, basis="greedy"),
        ),
        (
            {"method": "palette", "bits": 1, "grain": 8},
            {"method": "uniform", "bits": 8, "grid": "midrise"},
            CodecSettings("uniform", 8, 8, grid="midrise"),
        ),
        ({"grid": "full", "range": "mse"}, {"method": "uniform"}, CodecSettings(grid="full", range="mse")),
        ({"method": "palette", "cluster_dim": 4}, {"method": "uniform"}, CodecSettings("uniform", 4)),
        (
            {"method": "palette", "cluster_dim": 4},
            {"method": "palette", "bits": 8},
            CodecSettings("palette", 8, cluster_dim=4),
        ),
        (
            {"grid": "full"},
            {"method": "palette", "cluster_dim": 2},
            CodecSettings("palette", 4, cluster_dim=2),
        ),
    ],
)
def test_a_change_of_method_leaves_the_other_methods_options_behind(base, override, expected):
    config = R2QuantizationConfig(**base, overrides={"a.weight": override})
    assert config.settings_for("a.weight") == expected
    assert config.settings_for("b.weight") == CodecSettings(**base)


def test_an_override_turns_affine_on_and_off():
    config = R2QuantizationConfig(grid="full", overrides={"a": {"symmetric": False}})
    assert config.settings_for("a") == CodecSettings(symmetric=False)
    config = R2QuantizationConfig(symmetric=False, overrides={"a": {"symmetric": True}})
    assert config.settings_for("a") == CodecSettings(symmetric=True, grid="restricted")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"bit": 4}, "unknown key 'bit' in R2QuantizationConfig; did you mean 'bits'"),
        ({"skips": ["a"]}, "unknown key 'skips' .* did you mean 'skip'"),
        ({"min_num": 3}, "unknown key 'min_num' .* did you mean 'min_numel'"),
        ({"qqqq": 4}, "unknown key 'qqqq' .* known keys: method, bits, grain, .*overrides, include, skip"),
        ({"overrides": {"a.*": {"grains": 4}}}, r"unknown key 'grains' in overrides\['a\.\*'\]; did you mean 'grain'"),
        ({"overrides": {"a": {"skip": []}}}, r"unknown key 'skip' in overrides\['a'\]"),
        ({"method": "gptq"}, "unknown method 'gptq': use one of uniform, palette"),
        ({"bits": 1}, "bits=1 .* from 2 to 8 for uniform; method='palette'"),
        ({"bits": 2.5}, r"bits=2\.5 .* whole number"),
        ({"grain": "row"}, "unknown grain 'row': use 'tensor', 'channel' or a positive group size"),
        ({"symmetric": 1}, "symmetric=1 is not true or false"),
        ({"grid": "narrow"}, "unknown grid 'narrow': use one of"),
        ({"grid": "full", "symmetric": False}, "grid='full' needs symmetric=True"),
        ({"range": "percent"}, "unknown range 'percent': use one of min_max, mse"),
        ({"method": "palette", "grid": "full"}, "'grid' is an option of method 'uniform'; remove it for 'palette'"),
        ({"method": "palette", "symmetric": True}, "'symmetric' is an option of method 'uniform'"),
        ({"method": "palette", "range": "mse"}, "'range' is an option of method 'uniform'"),
        ({"basis": "greedy"}, "'basis' is an option of method 'least_squares'; remove it for 'uniform'"),
        ({"method": "least_squares", "basis": "ternary"}, "basis='ternary' .* set bits=2, not 4"),
        ({"cluster_dim": 2}, "'cluster_dim' is an option of method 'palette'; remove it for 'uniform'"),
        ({"method": "palette", "cluster_dim": 0}, "cluster_dim=0 is not a whole number from 1 to 64"),
        ({"overrides": {"a": {"cluster_dim": 2}}}, "'cluster_dim' is an option of method 'palette'"),
        (
            {"method": "palette", "cluster_dim": 2, "overrides": {"a": {"method": "uniform", "cluster_dim": 2}}},
            "'cluster_dim' is an option of method 'palette'; remove it for 'uniform'",
        ),
        ({"method": "palette", "overrides": {"a": {"cluster_dim": 65}}}, "cluster_dim=65 is not a whole number"),
        ({"overrides": {"a": {"bits": 9}}}, "bits=9 .* from 2 to 8"),
        ({"overrides": {"a": {"method": "palette", "range": "mse"}}}, "'range' is an option of method 'uniform'"),
        ({"overrides": {"a": {"grain": 0}}}, "unknown grain 0"),
        ({"overrides": {"a": 4}}, "overrides"),
        ({"overrides": {"a": None}}, "overrides"),
        ({"overrides": {"a": "bits"}}, "overrides"),
        ({"overrides": "abc"}, "overrides"),
        ({"overrides": ["abc"]}, "overrides"),
        ({"overrides": 5}, "overrides"),
        ({"overrides": [5]}, "overrides"),
        ({"overrides": [(1, {"bits": 2})]}, "overrides"),
        ({"include": "encoder.*"}, r"include is a list of patterns; write \['encoder\.\*'\]"),
        ({"skip": "classifier.weight"}, r"skip is a list of patterns; write \['classifier\.weight'\]"),
        ({"include": 5}, "include is a list of patterns"),
        ({"skip": [5]}, "skip is a list of patterns"),
        ({"min_numel": -1}, "min_numel"),
        ({"min_numel": "many"}, "min_numel"),
        ({"refine": ["bias"]}, "unknown refinement 'bias': use one of equalize, absorb_bias, .*batch_norm"),
        ({"refine": ["adaround", "compensate"]}, "adaround and compensate both round the weights: keep one"),
        (
            {"method": "palette", "aware": "dkm", "refine": ["batch_norm", "equalize"]},
            r"refine=\['equalize'\] is for post-training compression: remove it, or aware='dkm'",
        ),
        ({"refine": "batch_norm"}, r"refine is a list.*\['batch_norm'\]"),
        ({"quant_method": "gptq"}, "quant_method 'hf_r2'"),
        ({"format_version": FORMAT_VERSION + 1}, rf"format version {FORMAT_VERSION + 1}.*pip install -U hf_r2"),
        ({"format_version": 0}, "format version 0"),
        ({"format_version": "1"}, "format version '1'"),
        ({"format_version": None}, "format version None"),
    ],
)
def test_a_bad_value_is_refused_with_what_to_do(given, message):
    with pytest.raises(ValueError, match=message):
        R2QuantizationConfig(**given)


def test_steps_of_refinement_are_put_into_their_order():
    config = R2QuantizationConfig(refine=["batch_norm", "bias_correction", "adaround", "equalize", "batch_norm"])
    assert config.refine == ["equalize", "adaround", "bias_correction", "batch_norm"]
    assert R2QuantizationConfig(**through_json(config)).refine == config.refine
    assert R2QuantizationConfig().refine == []


def test_a_newer_format_is_refused_before_its_new_keys():
    with pytest.raises(ValueError, match="pip install -U hf_r2"):
        R2QuantizationConfig(format_version=FORMAT_VERSION + 1, key_of_the_future=True)


def test_patterns_may_be_any_sequence_but_a_string():
    config = R2QuantizationConfig(include=("a.*",), skip=("b.*", "c.*"))
    assert (config.include, config.skip) == (["a.*"], ["b.*", "c.*"])


def test_what_was_handed_over_is_copied():
    overrides, skip = {"a": {"bits": 2}}, ["b"]
    config = R2QuantizationConfig(overrides=overrides, skip=skip)
    overrides["a"]["bits"] = 8
    overrides["b"] = {"bits": 8}
    skip.append("c")
    assert config.settings_for("a").bits == 2
    assert config.settings_for("b").bits == 4
    assert config.skip == ["b"]


def test_transformers_options_beside_a_config_take_effect():
    config, unused = R2QuantizationConfig.from_dict({"bits": 4}, return_unused_kwargs=True, bits=2, device_map="cpu")
    assert unused == {"device_map": "cpu"}
    assert config.bits == 2
    assert config.settings_for("a.weight").bits == 2
    assert config.to_dict()["bits"] == 2


def test_an_updated_config_takes_effect():
    config = R2QuantizationConfig(bits=4)
    assert config.update(bits=8, other=1) == {"other": 1}
    assert config.settings_for("a.weight").bits == config.bits == 8


def test_configs_are_equal_only_if_they_say_the_same():
    assert R2QuantizationConfig(bits=2) == R2QuantizationConfig(bits=2)
    assert R2QuantizationConfig(bits=2) != R2QuantizationConfig(bits=8)
    either = {"a*": {"bits": 2}}, {"*": {"bits": 8}}
    assert R2QuantizationConfig(overrides={**either[0], **either[1]}) != R2QuantizationConfig(
        overrides={**either[1], **either[0]}
    )


def test_printing_shows_what_is_written():
    config = R2QuantizationConfig(method="palette", bits=2)
    assert json.loads(str(config).removeprefix("R2QuantizationConfig")) == config.to_dict()


def test_encode_asks_the_config_for_the_weight_of_this_name():
    weight = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    config = R2QuantizationConfig(overrides={"head.*": {"method": "palette", "bits": 1}})
    assert encode(weight, config, "head.weight").settings == CodecSettings("palette", 1)
    assert encode(weight, config, "body.weight").settings == CodecSettings("uniform", 4)
    assert encode(weight, config).settings == CodecSettings("uniform", 4)
