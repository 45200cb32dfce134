"""Distillation over two processes: that of one process, whatever cuts the student; the teacher is whole in each."""

import itertools

import pytest
from trainer_cases import DISTRIBUTIONS, Case, Result
from training_cases import assert_close, assert_same

pytestmark = pytest.mark.slow

MODELS = ["bert", "gpt2", "llama"]
TEACHERS = {
    "start": {"r2_teacher": "start", "r2_distillation_share": 0.7},
    "checkpoint": {"r2_teacher": "saved", "r2_distillation_share": 1.0},
}
ARGUMENTS = {"r2_strength": 0.1, "r2_distillation_temperature": 2.0, "max_grad_norm": 1.0}
SETTINGS = {f"{model}-{teacher}": (model, TEACHERS[teacher]) for model, teacher in itertools.product(MODELS, TEACHERS)}
BATCHES = {
    "halves": {"per_device_train_batch_size": 4},
    "quarters": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}
# transformers' FSDP2 cuts the student while loading it, and a start in pieces is refused
VARIANTS = [
    (name, distribution, batches)
    for name, distribution, batches in itertools.product(SETTINGS, DISTRIBUTIONS, BATCHES)
    if distribution != "fsdp2_of_transformers" or not name.endswith("start")
]


def case(name, **others):
    model, teacher = SETTINGS[name]
    return Case(model, {**ARGUMENTS, **teacher, **others.pop("batches", {})}, evaluate=True, **others)


@pytest.fixture(scope="module")
def alone(run_cases):
    directory = run_cases({name: case(name) for name in SETTINGS}, "cpu")
    return lambda name: Result.load(directory / name)


@pytest.fixture(scope="module")
def together(run_cases):
    """Find the results of a training in two processes, of each process."""
    cases = {config: {} for config, _ in DISTRIBUTIONS.values()}
    for name, distribution, batches in VARIANTS:
        config, fsdp2 = DISTRIBUTIONS[distribution]
        variant = case(name, batches=BATCHES[batches], fsdp2=fsdp2)
        cases[config][f"{distribution}-{name}-{batches}"] = variant
    cases["ddp"]["estranged"] = case("gpt2-start", batches=BATCHES["halves"], estranged=True)
    cases["ddp"]["cut"] = case("llama-start", batches=BATCHES["halves"], fsdp2=True)
    directories = {}
    for config, some in cases.items():
        directories |= dict.fromkeys(some, run_cases(some, config))
    return lambda name: [Result.load(directories[name] / name, rank) for rank in range(2)]


def assert_same_training(result, expected):
    assert len(result.logs) == len(expected.logs) == 4
    for entry, expected_entry in zip(result.logs, expected.logs, strict=True):
        assert entry == pytest.approx(expected_entry, abs=1e-5, rel=1e-5)
    assert_close(result.weights, expected.weights)
    assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-5)


@pytest.mark.parametrize(("name", "distribution", "batches"), VARIANTS)
def test_two_processes_train_as_one(alone, together, name, distribution, batches):
    first, second = together(f"{distribution}-{name}-{batches}")
    assert first.processes == 2
    assert_same_training(first, alone(name))
    assert_same(second.weights, first.weights)
    assert max(first.logged("distillation_loss")) > 1e-4


def test_every_process_has_the_teacher_of_the_first(alone, together):
    for result in together("estranged"):
        assert_same_training(result, alone("gpt2-start"))


def test_a_start_in_pieces_is_refused(together):
    with pytest.raises(AssertionError, match=r"cannot copy weights that FSDP2 has cut .* name of the checkpoint"):
        together("cut")
