import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
from trainer_cases import DISTRIBUTIONS, Case, Result
from training_cases import assert_close, assert_same

pytestmark = pytest.mark.slow

METHODS = {
    "l_inf": {"r2_loss": "l_inf"},
    "margin_max": {"r2_loss": "margin", "r2_margin_reduction": "max"},
    "margin_sum": {"r2_loss": "margin", "r2_margin_reduction": "sum", "r2_strength": 0.01},
    "soft_min_max": {"r2_loss": "soft_min_max"},
    "tail": {"r2_loss": "tail", "r2_tail_fraction": 0.1, "r2_strength": 0.5},
    "kurtosis": {"r2_loss": "kurtosis", "r2_strength": 0.003},
    "clip": {"r2_mode": "clip", "r2_clip": 1.2},
    "prox": {"r2_mode": "prox"},
}
AUTO = {
    "auto_crest": {"r2_target_crest": 1.8},
    "auto_crest_prox": {"r2_target_crest": 1.8, "r2_mode": "prox"},
    "auto_gradient_ratio": {"r2_target_gradient_ratio": 0.5},
}
# The inputs of the Bert's and the GPT-2's weights are 15 and 35: 5 divides them, 4 does not
GRAINS = ["tensor", "channel", "5", "4"]
COMMON = {"r2_strength": 0.1, "r2_learning_rate": 0.1, "max_grad_norm": 1.0}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}


def make_settings():
    """Models and arguments by name."""
    settings = {}
    for model, method, grain in itertools.product(["bert_regression", "gpt2"], METHODS, GRAINS):
        settings[f"{model}-{method}-{grain}"] = (model, {**COMMON, **METHODS[method], "r2_grain": grain})
    for model, method in itertools.product(["bert_regression", "gpt2"], AUTO):
        settings[f"{model}-{method}"] = (model, {**COMMON, **AUTO[method], "r2_strength": "auto"})
    for method in METHODS:
        settings[f"llama-{method}"] = ("llama", {**COMMON, **METHODS[method]})
    # An evaluation leaves FSDP2 with whole weights where a step leaves cut ones
    for method in ["l_inf", "margin_max", "prox"]:
        settings[f"llama-{method}-evaluated"] = ("llama", {**COMMON, **METHODS[method], **EVALUATED})
    return settings | {"bert-l_inf": ("bert", COMMON), "fixed_norm_resnet-l_inf": ("fixed_norm_resnet", COMMON)}


SETTINGS = make_settings()
LEARNING = [name for name in SETTINGS if "margin" in name or "soft_min_max" in name]
# Classifiers whose loss is a mean that does not heed the number of items, and language models whose loss does
ACCUMULATED = ["bert-l_inf", "fixed_norm_resnet-l_inf", "llama-l_inf", "llama-margin_max"]
ESTRANGED = ["gpt2-margin_max-5", "gpt2-soft_min_max-tensor", "gpt2-prox-tensor"]
UNTRAINED = ["bert", "llama"]


class Variant(NamedTuple):
    """Another way to take the batches of a setting."""

    setting: str
    config: str
    case: Case


def make_variants():
    variants = {}
    for name, distribution in itertools.product(SETTINGS, DISTRIBUTIONS):
        model, arguments = SETTINGS[name]
        config, fsdp2 = DISTRIBUTIONS[distribution]
        if model == "fixed_norm_resnet" and distribution != "ddp":
            continue
        halves = {**arguments, "per_device_train_batch_size": 4}
        case = Case(model, halves, fsdp2=fsdp2, evaluate=name in ACCUMULATED)
        variants[f"{distribution}-{name}"] = Variant(name, config, case)
        if name in ACCUMULATED:
            quarters = {**arguments, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
            accumulated = replace(case, arguments=quarters)
            variants[f"{distribution}-{name}-accumulated"] = Variant(name, config, accumulated)
        if name in ESTRANGED and not fsdp2:
            variants[f"{distribution}-{name}-estranged"] = Variant(name, config, replace(case, estranged=True))
    return variants


VARIANTS = make_variants()


@pytest.fixture(scope="module")
def alone(run_cases):
    """Find the result of a training in one process."""
    cases = {
        name: Case(model, arguments, evaluate=name in ACCUMULATED) for name, (model, arguments) in SETTINGS.items()
    }
    for name in ACCUMULATED:
        pieces = {**cases[name].arguments, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
        cases[f"{name}-accumulated"] = replace(cases[name], arguments=pieces)
    for model, _ in SETTINGS.values():
        cases[f"{model}-unrestricted"] = Case(model, {"r2_mode": "none", "max_grad_norm": 1.0})
    for model in UNTRAINED:
        cases[f"{model}-untrained"] = Case(model, {}, train=False, evaluate=True)
    directory = run_cases(cases, "cpu")
    return lambda name: Result.load(directory / name)


@pytest.fixture(scope="module")
def together(run_cases):
    """Find the results of a training in two processes, of each process."""
    cases = {config: {} for config, _ in DISTRIBUTIONS.values()}
    for name, variant in VARIANTS.items():
        cases[variant.config][name] = variant.case
    for model in UNTRAINED:
        cases["ddp"][f"{model}-untrained"] = Case(model, {"per_device_train_batch_size": 4}, train=False, evaluate=True)
    directories = {}
    for config, some in cases.items():
        directories |= dict.fromkeys(some, run_cases(some, config))
    return lambda name: [Result.load(directories[name] / name, rank) for rank in range(2)]


def assert_same_training(result, expected):
    assert len(result.logs) == len(expected.logs) == 4
    for entry, expected_entry in zip(result.logs, expected.logs, strict=True):
        assert entry == pytest.approx(expected_entry, abs=1e-5, rel=1e-5)
    assert_close(result.weights, expected.weights)
    assert_close(result.learned, expected.learned)
    assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-5)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_one(alone, together, name):
    assert_same_training(together(name)[0], alone(VARIANTS[name].setting))


@pytest.mark.parametrize("name", ACCUMULATED)
def test_one_process_that_accumulates_trains_as_with_whole_batches(alone, name):
    assert_same_training(alone(f"{name}-accumulated"), alone(name))


@pytest.mark.parametrize("name", VARIANTS)
def test_processes_end_with_the_same_weights_and_learned_values(together, name):
    first, second = together(name)
    assert first.processes == second.processes == 2
    assert_same(second.weights, first.weights)
    assert_same(second.learned, first.learned)


@pytest.mark.parametrize("name", UNTRAINED)
def test_two_processes_evaluate_an_untrained_model_as_one(alone, together, name):
    expected = alone(f"{name}-untrained").eval_loss
    assert together(f"{name}-untrained")[0].eval_loss == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_two_processes_warn_once_that_the_loss_ignores_the_number_of_items(together, distribution):
    messages = [message for result in together(f"{distribution}-bert-l_inf") for message in result.messages]
    assert ["number of items" in message for message in messages].count(True) == 1


# --- that these trainings can tell -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SETTINGS)
def test_the_restriction_matters(alone, name):
    weights, unrestricted = alone(name).weights, alone(f"{SETTINGS[name][0]}-unrestricted").weights
    assert max((weights[key] - unrestricted[key]).abs().max().item() for key in weights) > 1e-3


@pytest.mark.parametrize("name", LEARNING)
def test_learnable_values_change(alone, name):
    assert alone(name).change > 1e-3


@pytest.mark.parametrize(
    "name", [name for name in VARIANTS if name.startswith("fsdp2") and not name.endswith("evaluated")]
)
def test_fsdp2_cuts_every_parameter(together, name):
    first, second = (result.held for result in together(name))
    for parameter, (elements_here, elements) in first.items():
        assert 0 < elements_here < elements or second[parameter] == [0, elements]
        assert elements_here + second[parameter][0] == elements


def test_ddp_cuts_nothing(together):
    for result in together("ddp-bert_regression-l_inf-tensor"):
        assert all(here == elements for here, elements in result.held.values())


@pytest.mark.parametrize("distribution", ["fsdp2_of_transformers", "fsdp2_of_accelerate"])
def test_cuts_are_uneven_and_leave_the_second_process_nothing_of_one_weight(together, distribution):
    held = together(f"{distribution}-bert_regression-l_inf-tensor")[1].held
    assert held["classifier.weight"] == [0, 15]
    assert held["bert.encoder.layer.0.intermediate.dense.weight"] == [17 * 15, 35 * 15]
    assert held["bert.pooler.dense.weight"] == [7 * 15, 15 * 15]
