"""Plans of whole checkpoints: within the target, as predicted, never worse than uniform, and read by `quantize`."""

import itertools
import math
import weakref
from statistics import stdev

import pytest
import torch
import yaml
from planning_models import images, save
from transformers import AutoModelForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.codecs import CodecSettings
from hf_r2.evaluation import evaluate_classifier
from hf_r2.files import weight_file_bytes
from hf_r2.planning import plan_checkpoint
from hf_r2.planning.calibration import CalibratedModel, Measured
from hf_r2.planning.choices import Choices, Target
from hf_r2.planning.losses import measured_losses
from hf_r2.planning.output import draw_plan, parse_size, plan_table, summary, write_plan
from hf_r2.planning.search import ROUNDS
from hf_r2.planning.source import FloatCheckpoint
from hf_r2.quantization.quantizer import load_float_model
from hf_r2.quantization.tensor_files import StoredTensor

UNIFORM = {"method": "uniform", "grain": "channel", "target_bits": 4.5}


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return save("resnet", tmp_path_factory.mktemp("planning") / "float")


@pytest.fixture(scope="module")
def measured(resnet):
    return plan_checkpoint(resnet, **UNIFORM, batches=images())


def quantized(source, plan, directory):
    """Compress by the YAML that the plan is written to; returns bytes of the weight files."""
    content = yaml.safe_load(write_plan(plan, directory / "plan.yaml", "test").read_text(encoding="utf-8"))
    R2Quantizer.from_pretrained(source).quantize(directory / "out", R2QuantizationConfig(**content))
    return weight_file_bytes(directory / "out")


def range_of(choices):
    """Bytes of the smallest and of the largest files."""
    sizes = [choices.checkpoint.file_bytes(choices.settings(choices.extreme(largest))) for largest in (False, True)]
    return tuple(sizes)


@pytest.mark.parametrize(
    ("name", "method", "grain", "include", "share"),
    [
        ("bert", "any", "tensor", None, 0.4),
        ("bert", "palette", "channel", None, 0.6),
        ("bert", "uniform", "channel", ["*"], 0.6),
        ("gpt2", "uniform", "channel", ["*"], 0.3),
        ("gpt2", "uniform", "channel", None, 0.8),
        ("resnet", "least_squares", 16, None, 0.2),
        ("resnet", "uniform", "tensor", None, 0),
        ("resnet", "uniform", "tensor", None, 0.5),
        ("resnet", "uniform", "tensor", None, 1),
        ("vit", "uniform", "tensor", None, 0.5),
    ],
)
def test_the_file_is_as_large_as_predicted_and_not_larger_than_asked_for(name, method, grain, include, share, tmp_path):
    source = save(name, tmp_path / "float")
    smallest, largest = range_of(Choices(FloatCheckpoint(source, include, None), method, grain))
    target = round(smallest + share * (largest - smallest))
    plan = plan_checkpoint(source, method, grain, target_bytes=target, include=include)
    size = quantized(source, plan, tmp_path)
    assert size <= target
    # Of vit, only how much longer names are in the header is not known before
    assert plan.point.file_bytes == size or (name == "vit" and size < plan.point.file_bytes < size + 1000)
    assert {key: plan.config.settings_for(key) for key in plan.weights} == plan.point.settings
    assert plan.config.include == include
    assert plan.point.predicted <= plan.best_uniform.predicted


def test_target_bits_count_codebooks(resnet):
    plan = plan_checkpoint(resnet, **UNIFORM)
    elements = sum(math.prod(weight.shape) for weight in plan.weights.values())
    assert 4.4 < 8 * sum(weight.nbytes for weight in plan.weights.values()) / elements <= 4.5


@pytest.mark.parametrize("sensitivity", ["sqnr", "fisher", "kl"])
def test_the_allocation_is_that_of_brute_force(sensitivity, resnet):
    """Over all combinations of the choices of three weights, with the sizes of whole files."""
    skip = ["resnet.encoder.stages.1.*", "resnet.encoder.stages.0.layers.0.layer.1.*"]
    batches = None if sensitivity == "sqnr" else images()
    choices = Choices(FloatCheckpoint(resnet, None, skip), "uniform", "tensor")
    model = None if batches is None else CalibratedModel(resnet, choices.checkpoint, batches)
    losses = measured_losses(choices, sensitivity, model)[sensitivity]
    smallest, largest = range_of(choices)
    target = (smallest + largest) // 2
    best = min(
        math.fsum(own[choice] for own, choice in zip(losses, combination, strict=True))
        for combination in itertools.product(*map(range, map(len, choices.options)))
        if choices.checkpoint.file_bytes(choices.settings(combination)) <= target
    )
    options = {"batches": batches, "sensitivity": sensitivity, "skip": skip}
    plan = plan_checkpoint(resnet, "uniform", "tensor", target_bytes=target, **options)
    assert len(choices.names) == 3
    assert plan.allocated.predicted == pytest.approx(best, rel=1e-6)
    assert plan.gap <= 1e-9


def test_a_plan_is_never_worse_than_uniform_settings_on_its_data(resnet, measured):
    checkpoint = FloatCheckpoint(resnet, None, None)
    budget = UNIFORM["target_bits"] * checkpoint.numel / 8
    fitting = [
        point
        for point in measured.uniform
        if sum(checkpoint.weights[name].nbytes(own) for name, own in point.settings.items()) <= budget
    ]
    assert len(fitting) == 3
    assert measured.best_uniform in fitting
    assert all(measured.point.measured.kl <= other.measured.kl for other in fitting)
    assert measured.point.measured.cross_entropy <= measured.best_uniform.measured.cross_entropy


def test_what_was_measured_is_what_the_compressed_checkpoint_does(resnet, measured, tmp_path):
    quantized(resnet, measured, tmp_path)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    figures = evaluate_classifier(model, images(), float_model=load_float_model(resnet))
    assert measured.point.measured.kl == pytest.approx(figures["kl"], rel=1e-3)
    assert measured.point.measured.cross_entropy == pytest.approx(figures["loss"])
    assert measured.point.measured.accuracy == pytest.approx(figures["accuracy"])
    assert measured.point.measured.recovery == pytest.approx(figures["recovery"])


def test_improving_starts_from_uniform_settings_if_they_measure_better(resnet, monkeypatch):
    """With losses that call the smallest choice the best, and no rounds, uniform settings are the plan."""
    monkeypatch.setattr("hf_r2.planning.search.ROUNDS", 0)
    monkeypatch.setattr(
        "hf_r2.planning.plan.measured_losses",
        lambda choices, *_: {"kl": [list(map(float, range(len(own)))) for own in choices.options]},
    )
    plan = plan_checkpoint(resnet, **UNIFORM, batches=images())
    assert plan.point.settings == plan.best_uniform.settings
    assert {own.bits for own in plan.allocated.settings.values()} == {2}
    assert plan.point.measured.kl < plan.allocated.measured.kl


def differing(differences, kl):
    """Figures of a point whose losses are 1 and these differences from it."""
    return Measured(kl, 1 + torch.tensor(differences, dtype=torch.float64), 0.5, 1.0)


@pytest.mark.parametrize(
    ("differences", "better"),
    [
        ([-1.0, -1.1, -0.9, -1.0], True),
        ([1.0, 1.1, 0.9, 1.0], False),
        ([0.0] * 4, False),
        ([-1.0], False),  # one example shows nothing
        ([-100.0, *[0.0] * 99], False),  # nor does one of many: its mean is one standard error
        ([*[-1.0] * 5, *[0.0] * 95], True),
        ([*[-1.0] * 5, *[1.0] * 5, *[0.0] * 90], False),
    ],
    ids=str,
)
def test_a_loss_is_surely_lower_if_many_examples_say_so(differences, better):
    uniform = differing([0.0] * len(differences), 0.2)
    found = differing(differences, 0.1)
    assert found.surely_better(uniform) is better
    mean, error = found.excess(uniform)
    assert mean == pytest.approx(sum(differences) / len(differences))
    if len(differences) > 1:
        assert error == pytest.approx(stdev(differences) / math.sqrt(len(differences)))


@pytest.mark.parametrize(
    ("differences", "kl", "kept"),
    [
        ([-0.1, -0.2, -0.1, -0.2], 0.1, False),
        ([-0.1, 0.2, -0.3, 0.1], 0.1, True),  # the labels do not tell
        ([0.1, 0.2, 0.1, 0.2], 0.1, True),
        ([-0.1, -0.2, -0.1, -0.2], 0.3, True),  # further from the float model
    ],
    ids=str,
)
def test_a_plan_replaces_uniform_settings_only_if_it_is_surely_better(differences, kl, kept, resnet, monkeypatch):
    """All points but uniform ones measure as given."""

    def measure(model):
        uniform = len(set(model._settings.values())) == 1
        return differing([0.0] * 4, 0.2) if uniform else differing(differences, kl)

    monkeypatch.setattr(CalibratedModel, "measure", measure)
    plan = plan_checkpoint(resnet, **UNIFORM, batches=images())
    assert (plan.point.settings == plan.best_uniform.settings) is kept
    assert any("they are the plan" in line for line in summary(plan)) is kept


def test_without_labels_the_divergence_decides(resnet):
    unlabelled, labelled = (
        CalibratedModel(resnet, FloatCheckpoint(resnet, None, None), images(labelled=own)) for own in (False, True)
    )
    settings = dict.fromkeys(unlabelled._places, CodecSettings("uniform", 3, "channel"))
    for model in (unlabelled, labelled):
        model.compress(settings)
    assert unlabelled.measure().losses.mean().item() == pytest.approx(unlabelled.measure().kl)
    assert unlabelled.measure().cross_entropy is None
    assert labelled.measure().kl == pytest.approx(unlabelled.measure().kl)
    assert labelled.measure().cross_entropy > 2 * labelled.measure().kl


@pytest.mark.parametrize("label", [-1, 3])
def test_labels_of_other_classes_are_refused(label, resnet):
    (batch, *_) = images()
    batch["labels"][0] = label
    with pytest.raises(ValueError, match="the model has the classes 0 to 2, the labels are"):
        plan_checkpoint(resnet, **UNIFORM, batches=[batch])


def test_rounds_lower_the_measured_divergence(resnet, monkeypatch):
    monkeypatch.setattr("hf_r2.planning.search.Search.best_uniform", lambda self, target: None)
    plans = []
    for rounds in (0, ROUNDS):
        monkeypatch.setattr("hf_r2.planning.search.ROUNDS", rounds)
        plans.append(plan_checkpoint(resnet, **UNIFORM, batches=images(), sensitivity="fisher"))
    assert plans[1].point.measured.kl < plans[0].point.measured.kl


def test_least_recovery_takes_the_smallest_that_reaches_it(resnet):
    plan = plan_checkpoint(resnet, "uniform", min_recovery=0.9, batches=images())
    assert plan.point.measured.recovery >= 0.9
    assert plan.best_uniform.file_bytes >= plan.point.file_bytes
    smaller = [point for point in plan.uniform if point.file_bytes < plan.point.file_bytes]
    assert smaller
    assert all(point.measured.recovery < 0.9 for point in smaller)


def test_a_recovery_out_of_reach_says_what_was_reached(resnet, monkeypatch):
    monkeypatch.setattr(CalibratedModel, "measure", lambda self: Measured(0.1, torch.ones(4).double(), 0.4, 0.5))
    with pytest.raises(ValueError, match=r"cannot be reached .* best measured is 0\.5000, at [\d,]+ bytes"):
        plan_checkpoint(resnet, "uniform", min_recovery=0.9, batches=images())


def test_data_without_labels_plan_sizes_but_no_recovery(resnet):
    plan = plan_checkpoint(resnet, **UNIFORM, batches=images(labelled=False))
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
        ({"target_bits": 0.5}, r"0.5 bits per weight cannot be planned: .* it is 1\.\d+ to \d+\.\d+ bits"),
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


def test_tables_of_the_size_of_the_weight_are_no_choice(resnet):
    """256 levels for each of 8 channels of 72 elements would take more than the float weight."""
    choices = Choices(FloatCheckpoint(resnet, None, None), "palette", "channel")
    name = "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight"
    weight, options = choices.checkpoint.weights[name], choices.options[choices.names.index(name)]
    assert weight.nbytes(CodecSettings("palette", 8, "channel")) > 4 * weight.shape.numel()
    assert max(settings.bits for settings in options) < 8
    assert all(weight.nbytes(settings) < 4 * weight.shape.numel() for settings in options)
    labels = [max(own.bits for own in settings.values()) for settings in choices.uniform()]
    assert labels == sorted({settings.bits for own in choices.options for settings in own})


def test_only_what_is_allowed_is_allocated(resnet):
    choices = Choices(FloatCheckpoint(resnet, None, None), "any", "tensor")
    smallest, largest = range_of(choices)
    target = Target(choices, file_bytes=(smallest + largest) // 2)
    every = target.allocate([{choice: float(-choice) for choice in range(len(own))} for own in choices.options])
    some = target.allocate([dict.fromkeys((0, 3), 0.0) for _ in choices.options])
    assert max(target.size(every.choices), target.size(some.choices)) <= target.nbytes
    assert set(some.choices) <= {0, 3} < set(every.choices) | {0, 3}


def test_without_data_no_model_is_loaded(resnet, monkeypatch):
    """Nor more than one weight held: each is gone when the next is read."""
    monkeypatch.setattr("hf_r2.planning.source.load_float_model", None)
    monkeypatch.setattr("hf_r2.planning.calibration.load_float_model", None)
    read, alive = StoredTensor.read, []

    def reading(stored):
        assert not [reference for reference in alive if reference() is not None]
        weight = read(stored)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(StoredTensor, "read", reading)
    plan = plan_checkpoint(resnet, **UNIFORM)
    assert len(alive) == len(plan.weights)


def test_a_compressed_checkpoint_is_refused(resnet, tmp_path):
    R2Quantizer.from_pretrained(resnet).quantize(tmp_path / "out", R2QuantizationConfig())
    with pytest.raises(ValueError, match="already quantized"):
        plan_checkpoint(str(tmp_path / "out"), **UNIFORM)


def test_a_language_model_is_planned_by_its_logits(tmp_path):
    """Where labels are the tokens themselves, there is no recovery to speak of."""
    tokens = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": tokens, "labels": tokens}]
    plan = plan_checkpoint(save("gpt2", tmp_path / "float"), **UNIFORM, include=["*"], batches=batches)
    assert plan.point.measured.kl <= plan.best_uniform.measured.kl
    assert plan.point.measured.recovery is None
    assert "transformer.wte.weight" in plan.weights


def test_paper_says_what_was_found(measured, resnet, tmp_path):
    lines = summary(measured)
    assert any("optimality gap" in line for line in lines)
    assert any("best uniform settings: uniform 4-bit" in line for line in lines)
    assert len(plan_table(measured).splitlines()) == 2 + len(measured.weights)
    without = plan_checkpoint(resnet, **UNIFORM)
    sizes = [draw_plan(plan, tmp_path / "plan.png").stat().st_size for plan in (measured, without)]
    assert sizes[0] > sizes[1] > 5000
    text = write_plan(measured, tmp_path / "plan.yaml", "origin").read_text(encoding="utf-8")
    assert text.startswith("# origin\n")
    assert set(yaml.safe_load(text)) == {"method", "bits", "grain", "overrides"}


@pytest.mark.parametrize(
    ("text", "size"),
    [("4MB", 4_000_000), ("500 kB", 500_000), ("1.5GiB", 1_610_612_736), ("48000", 48_000), ("2m", 2_000_000)],
)
def test_sizes_are_read(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "four", "4TB", "-3MB", "4 M B"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="write 4MB"):
        parse_size(text)
