"""Plans of whole checkpoints: within the target, as predicted, never worse than uniform, and read by `quantize`."""

import itertools
import math

import pytest
import yaml
from planning_models import images, save
from transformers import AutoModelForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.files import weight_file_bytes
from hf_r2.planning import plan_checkpoint
from hf_r2.planning.calibration import CalibratedModel
from hf_r2.planning.choices import Choices, Target
from hf_r2.planning.output import draw_plan, parse_size, plan_table, summary, write_plan
from hf_r2.planning.search import ROUNDS
from hf_r2.planning.source import FloatCheckpoint


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return save("resnet", tmp_path_factory.mktemp("planning") / "float")


@pytest.fixture(scope="module")
def measured(resnet):
    return plan_checkpoint(resnet, grain="tensor", target_bits=3, batches=images())


def quantized(source, target, plan, tmp_path):
    """Compress by the YAML that the plan is written to; returns bytes of the weight files."""
    content = yaml.safe_load(write_plan(plan, tmp_path / "plan.yaml", "test").read_text(encoding="utf-8"))
    R2Quantizer.from_pretrained(source).quantize(target, R2QuantizationConfig(**content))
    return weight_file_bytes(target)


@pytest.mark.parametrize("share", [0, 0.2, 0.7, 1])
@pytest.mark.parametrize(
    ("name", "method", "grain", "include"),
    [
        ("resnet", "palette", "tensor", None),
        ("resnet", "any", "channel", None),
        ("bert", "least_squares", 8, ["*"]),
        ("gpt2", "uniform", "channel", ["*"]),
        ("vit", "palette", "tensor", None),
    ],
)
def test_the_file_is_as_large_as_predicted_and_not_larger_than_asked_for(name, method, grain, include, share, tmp_path):
    source = save(name, tmp_path / "float")
    choices = Choices(FloatCheckpoint(source, include, None), method, grain)
    smallest, largest = (
        choices.checkpoint.file_bytes(choices.settings(choices.extreme(largest))) for largest in (False, True)
    )
    target = round(smallest + share * (largest - smallest))
    plan = plan_checkpoint(source, method, grain, target_bytes=target, include=include)
    size = quantized(source, tmp_path / "out", plan, tmp_path)
    assert size <= target
    assert plan.point.file_bytes == pytest.approx(size, abs=400 if name == "vit" else 0)
    # What is left over is less than the smallest step of some weight
    assert share in (0, 1) or target - plan.point.file_bytes < 0.06 * target
    assert {key: plan.config.settings_for(key) for key in plan.weights} == plan.point.settings
    assert plan.config.include == include


def test_target_bits_count_codebooks(resnet):
    plan = plan_checkpoint(resnet, grain="tensor", target_bits=2.5)
    elements = sum(math.prod(weight.shape) for weight in plan.weights.values())
    bits = 8 * sum(weight.nbytes for weight in plan.weights.values()) / elements
    assert 2.3 < bits <= 2.5


@pytest.mark.parametrize(("sensitivity", "data"), [("sqnr", False), ("fisher", True), ("kl", True)])
def test_the_allocation_is_that_of_brute_force(sensitivity, data, tmp_path):
    """On few weights, over all combinations of their choices, with the sizes of whole files."""
    source = save("resnet", tmp_path / "float")
    skip = ["resnet.encoder.stages.1.*", "resnet.encoder.stages.0.layers.0.layer.1.*"]
    batches = images() if data else None
    target = 13_000
    plan = plan_checkpoint(
        source, "uniform", "tensor", target_bytes=target, batches=batches, sensitivity=sensitivity, skip=skip
    )
    choices = Choices(FloatCheckpoint(source, None, skip), "uniform", "tensor")
    search = every_loss(source, choices, sensitivity, batches)
    combinations = itertools.product(*map(range, map(len, choices.options)))
    best = min(
        sum(own[choice] for own, choice in zip(search, combination, strict=True))
        for combination in combinations
        if choices.checkpoint.file_bytes(choices.settings(combination)) <= target
    )
    assert plan.allocated.predicted == pytest.approx(best, rel=1e-6)
    assert plan.gap <= 1e-9


def every_loss(source, choices, sensitivity, batches):
    from hf_r2.planning.losses import measured_losses

    model = None if batches is None else CalibratedModel(source, choices.checkpoint, batches)
    return measured_losses(choices, sensitivity, model)


def test_a_plan_is_never_worse_than_uniform_settings_on_its_data(resnet, measured):
    elements = FloatCheckpoint(resnet, None, None).numel
    fitting = [
        point
        for point in measured.uniform
        if 8 * sum(FloatCheckpoint(resnet, None, None).weights[n].nbytes(s) for n, s in point.settings.items())
        <= 3 * elements
    ]
    assert fitting
    assert measured.best_uniform in fitting
    assert all(measured.point.measured.kl <= point.measured.kl for point in fitting)
    assert measured.point.measured.kl <= measured.allocated.measured.kl


def test_what_was_measured_is_what_the_compressed_checkpoint_does(resnet, measured, tmp_path):
    from hf_r2.evaluation import evaluate_classifier
    from hf_r2.quantization.quantizer import load_float_model

    quantized(resnet, tmp_path / "out", measured, tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    figures = evaluate_classifier(model, images(), float_model=load_float_model(resnet))
    assert measured.point.measured.kl == pytest.approx(figures["kl"], rel=1e-3)
    assert measured.point.measured.recovery == pytest.approx(figures["recovery"])


def test_improving_starts_from_uniform_settings_if_they_measure_better(resnet, monkeypatch):
    """With sensitivities that mislead, and no rounds, uniform settings are the plan."""
    monkeypatch.setattr("hf_r2.planning.search.ROUNDS", 0)
    monkeypatch.setattr(
        "hf_r2.planning.plan.measured_losses",
        lambda choices, *_: [[float(index > 0) * 2.0**index for index in range(len(own))] for own in choices.options],
    )
    plan = plan_checkpoint(resnet, grain="tensor", target_bits=4.2, batches=images())
    assert plan.point.settings == plan.best_uniform.settings
    assert plan.point.measured.kl < plan.allocated.measured.kl


def test_rounds_go_on_from_a_bad_start(resnet, monkeypatch):
    monkeypatch.setattr("hf_r2.planning.search.Search.best_uniform", lambda self, target: None)
    kls = []
    for rounds in (0, ROUNDS):
        monkeypatch.setattr("hf_r2.planning.search.ROUNDS", rounds)
        kls.append(
            plan_checkpoint(
                resnet, grain="tensor", target_bits=3, batches=images(), sensitivity="sqnr"
            ).point.measured.kl
        )
    assert kls[1] < kls[0]


def test_least_recovery_takes_the_smallest_that_reaches_it(resnet):
    plan = plan_checkpoint(resnet, grain="tensor", min_recovery=0.9, batches=images())
    assert plan.point.measured.recovery >= 0.9
    smaller = [point for point in (*plan.front, *plan.uniform) if point.file_bytes < plan.point.file_bytes]
    assert smaller
    assert plan.best_uniform.file_bytes >= plan.point.file_bytes
    assert not [point for point in plan.uniform if point in smaller and point.measured.recovery >= 0.9]


def test_data_without_labels_plan_sizes_but_no_recovery(resnet):
    plan = plan_checkpoint(resnet, "uniform", target_bits=3.5, batches=images(labelled=False))
    assert plan.point.measured.recovery is None
    with pytest.raises(ValueError, match="labelled data"):
        plan_checkpoint(resnet, min_recovery=0.9, batches=images(labelled=False))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of"),
        ({"target_bits": 2, "target_bytes": 5000}, "exactly one of"),
        ({"target_bytes": 10}, r"10 bytes cannot be planned: .* it is [\d,]+ to [\d,]+ bytes"),
        ({"target_bytes": 10**9}, "1,000,000,000 bytes cannot be planned"),
        ({"target_bits": 0.5}, r"0.5 bits per weight cannot be planned: .* it is 1\.\d+ to \d\.\d+ bits"),
        ({"target_bits": 33}, "33 bits per weight cannot be planned"),
        ({"min_recovery": 0.9}, "give labelled data"),
        ({"min_recovery": 1.5}, "not a share"),
        ({"target_bits": 3, "sensitivity": "kl"}, "'kl' is measured: give data"),
        ({"target_bits": 3, "sensitivity": "hessian"}, "unknown sensitivity 'hessian'"),
        ({"target_bits": 3, "method": "gptq"}, "unknown method 'gptq'"),
        ({"target_bits": 3, "include": ["nothing.*"]}, "matches no weight"),
        ({"target_bits": 3, "batches": []}, "calibration data is empty"),
    ],
)
def test_mistakes_say_what_to_do(resnet, options, message):
    with pytest.raises(ValueError, match=message):
        plan_checkpoint(resnet, **{"grain": "tensor", **options})


def test_a_recovery_out_of_reach_says_what_was_reached(resnet):
    """Signs alone leave little of a model that was not trained for them."""
    batches = images()
    with pytest.raises(ValueError, match=r"cannot be reached .* best measured is 0\.\d+, at [\d,]+ bytes"):
        plan_checkpoint(resnet, "least_squares", "tensor", min_recovery=1, batches=only_hard(batches, resnet))


def only_hard(batches, source):
    """Data on which the float model is right, all of one class, so that any change of mind is a loss."""
    from hf_r2.quantization.quantizer import load_float_model

    model = load_float_model(source).eval()
    for batch in batches:
        batch["labels"] = model(pixel_values=batch["pixel_values"]).logits.argmax(-1)
    return batches


def test_tables_of_the_size_of_the_weight_are_no_choice(resnet):
    """256 levels for each of 8 channels of 72 elements take more than the float weight."""
    choices = Choices(FloatCheckpoint(resnet, None, None), "palette", "channel")
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    weight, options = choices.checkpoint.weights[name], choices.options[choices.names.index(name)]
    assert max(settings.bits for settings in options) < 8
    assert all(weight.nbytes(settings) < 4 * weight.shape.numel() for settings in options)
    assert [max(own.bits for own in settings.values()) for settings in choices.uniform()] == sorted(
        {settings.bits for own in choices.options for settings in own}
    )


def test_targets_are_met_by_every_allocation_that_is_allowed(resnet):
    choices = Choices(FloatCheckpoint(resnet, None, None), "any", "tensor")
    target = Target(choices, file_bytes=12_000)
    found = target.allocate([{choice: float(-choice) for choice in range(len(own))} for own in choices.options])
    assert target.size(found.choices) <= 12_000
    allowed = [dict.fromkeys((0, 3), 0.0) for _ in choices.options]
    assert set(target.allocate(allowed).choices) <= {0, 3}


def test_paper_says_what_was_found(measured, resnet, tmp_path):
    lines = summary(measured)
    assert any("optimality gap" in line for line in lines)
    assert any("best uniform settings: palette 2-bit" in line for line in lines)
    assert len(plan_table(measured).splitlines()) == 2 + len(measured.weights)
    assert draw_plan(measured, tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    without = plan_checkpoint(resnet, grain="tensor", target_bits=3)
    assert draw_plan(without, tmp_path / "b.png").stat().st_size > 5000
    text = write_plan(measured, tmp_path / "plan.yaml", "origin").read_text(encoding="utf-8")
    assert text.startswith("# origin\n")
    assert set(yaml.safe_load(text)) == {"method", "bits", "grain", "overrides"}


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4MB", 4_000_000),
        ("500 kB", 500_000),
        ("1.5GiB", 1_610_612_736),
        ("48000", 48_000),
        ("2M", 2_000_000),
        ("7B", 7),
    ],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "four", "4TB", "-3MB", "4 M B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write 4MB"):
        parse_size(text)
