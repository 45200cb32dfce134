import json

import pytest
from training_cases import make_bert, make_data
from transformers import HfArgumentParser, TrainingArguments

from hf_r2 import R2Trainer, R2TrainingArguments
from hf_r2.losses import RANGE_LOSSES

VALUES = {
    "r2_mode": "none",
    "r2_loss": "tail",
    "r2_strength": 0.25,
    "r2_target_crest": None,
    "r2_target_gradient_ratio": None,
    "r2_strength_factors": {"bert.*": 0.5},
    "r2_clip": 2.5,
    "r2_warmup_ratio": 0.2,
    "r2_start_ratio": 0.1,
    "r2_end_ratio": 0.9,
    "r2_grain": "64",
    "r2_include": ["bert.*", "classifier.weight"],
    "r2_exclude": ["*.query.weight"],
    "r2_min_numel": 100,
    "r2_tail_fraction": 0.5,
    "r2_aware": "dkm",
    "r2_aware_start_ratio": 0.5,
    "r2_teacher": "float/model",
    "r2_distillation_temperature": 2.0,
    "r2_distillation_share": 0.9,
    "r2_temperature": 3.5,
    "r2_margin_reduction": "sum",
    "r2_learning_rate": 0.002,
}


def command_line(values):
    """The words in which a shell would give these values."""
    words = []
    for name, value in values.items():
        if isinstance(value, dict):
            value = json.dumps(value)
        if value is not None:
            words += [f"--{name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def arguments(tmp_path, **values):
    return R2TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **values)


def test_example_values_cover_every_r2_field():
    assert set(VALUES) == {name for name in R2TrainingArguments.__dataclass_fields__ if name.startswith("r2_")}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("r2_mode", "both"),
        ("r2_loss", "l2"),
        ("r2_loss", "L_INF"),
        ("r2_margin_reduction", "mean"),
        ("r2_strength", -0.1),
        ("r2_strength", float("nan")),
        ("r2_strength", float("inf")),
        ("r2_strength", "strong"),
        ("r2_strength", float("inf")),
        ("r2_strength_factors", "{bert: 1}"),
        ("r2_clip", "auto"),
        ("r2_learning_rate", -1e-3),
        ("r2_learning_rate", float("nan")),
        ("r2_min_numel", -1),
        ("r2_tail_fraction", 0.0),
        ("r2_tail_fraction", 1.5),
        ("r2_tail_fraction", float("nan")),
        ("r2_temperature", -1.0),
        ("r2_temperature", float("nan")),
        ("r2_temperature", float("inf")),
        ("r2_grain", "row"),
        ("r2_grain", "0"),
        ("r2_grain", -8),
    ],
)
def test_bad_value_names_its_field(tmp_path, name, value):
    with pytest.raises(ValueError, match=name):
        arguments(tmp_path, **{name: value})


@pytest.mark.parametrize("target", ["r2_target_crest", "r2_target_gradient_ratio"])
def test_auto_strength_comes_with_its_target(tmp_path, target):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--r2_strength", "auto", f"--{target}", "1.5"]
    (args,) = HfArgumentParser(R2TrainingArguments).parse_args_into_dataclasses(words)
    assert (args.r2_strength, getattr(args, target)) == ("auto", 1.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r2_strength": "auto"}, "needs one target"),
        ({"r2_strength": "auto", "r2_target_crest": 2, "r2_target_gradient_ratio": 0.1}, "needs one target"),
        ({"r2_strength": 0.1, "r2_target_crest": 2}, "r2_strength is a number"),
        ({"r2_strength": "auto", "r2_target_crest": 0.9}, "not above 1"),
        ({"r2_strength": "auto", "r2_target_crest": 2, "r2_mode": "clip"}, "no strength to choose"),
        ({"r2_strength": "auto", "r2_target_gradient_ratio": 0.1, "r2_mode": "prox"}, "give r2_target_crest"),
    ],
)
def test_auto_strength_without_a_sound_target_is_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        arguments(tmp_path, **values)


@pytest.mark.parametrize("loss", RANGE_LOSSES)
def test_every_range_loss_is_accepted(tmp_path, loss):
    assert arguments(tmp_path, r2_loss=loss).r2_loss == loss


@pytest.mark.parametrize("grain", ["tensor", "channel", 16, "16"])
def test_every_grain_is_accepted(tmp_path, grain):
    assert arguments(tmp_path, r2_grain=grain).r2_grain == grain


def test_command_line_sets_every_field(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none", *command_line(VALUES)]
    (args,) = HfArgumentParser(R2TrainingArguments).parse_args_into_dataclasses(words)
    assert {name: getattr(args, name) for name in VALUES} == VALUES


def test_command_line_without_r2_fields_takes_the_defaults(tmp_path):
    words = ["--output_dir", str(tmp_path), "--use_cpu", "--report_to", "none"]
    (args,) = HfArgumentParser(R2TrainingArguments).parse_args_into_dataclasses(words)
    defaults = arguments(tmp_path)
    assert {name: getattr(args, name) for name in VALUES} == {name: getattr(defaults, name) for name in VALUES}


def test_parsed_dict_sets_every_field(tmp_path):
    values = {"output_dir": str(tmp_path), "use_cpu": True, "report_to": "none", **VALUES}
    (args,) = HfArgumentParser(R2TrainingArguments).parse_dict(values)
    assert {name: getattr(args, name) for name in VALUES} == VALUES


def test_dict_and_json_hold_every_field(tmp_path):
    args = arguments(tmp_path, **VALUES)
    assert {name: args.to_dict()[name] for name in VALUES} == VALUES
    assert {name: json.loads(args.to_json_string())[name] for name in VALUES} == VALUES


def test_every_field_has_help():
    fields = R2TrainingArguments.__dataclass_fields__
    assert [name for name in VALUES if not fields[name].metadata.get("help")] == []


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"r2_include": ["decoder.*"]}, "decoder"),
        ({"r2_exclude": ["*"]}, "no weight"),
        ({"r2_min_numel": 10**9}, "no weight"),
    ],
)
def test_empty_selection_is_refused_before_training(make_trainer, values, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_bert(), make_data("bert", 8), **values)


def test_arguments_without_r2_fields_are_refused_with_the_fix(tmp_path):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    with pytest.raises(ValueError, match="R2TrainingArguments"):
        R2Trainer(model=make_bert(), args=args, train_dataset=make_data("bert", 8))
