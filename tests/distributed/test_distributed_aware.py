"""Compression-aware training over two processes: with DDP that of one process, with FSDP2 refused before training."""

import json

import pytest
from trainer_cases import Case, Result
from training_cases import assert_close, assert_same

pytestmark = pytest.mark.slow

MODELS = ["bert_regression", "gpt2"]
AWARE = {"r2_aware": "dkm", "r2_mode": "clip", "r2_clip": 1.5, "r2_aware_start_ratio": 0.25}
METHODS = {
    "dkm": {},
    "least_squares": {},
    "lsq": {"activations": {"method": "lsq", "bits": 4}},
    "ewgs": {"grid": "midrise", "activations": {"method": "ewgs", "bits": 4}},
    "dorefa": {"grid": "midrise", "activations": {"method": "dorefa", "bits": 4}},
    "pact": {"grid": "midrise", "activations": {"method": "pact", "bits": 4}},
}
CASES = {f"{model}-{method}": (model, method) for model in MODELS for method in METHODS}


def make_case(model, method, **settings):
    arguments = {**AWARE, "r2_aware": method, **settings.pop("arguments", {})}
    return Case(model, arguments, quantization=METHODS[method], **settings)


@pytest.fixture(scope="module")
def alone(run_cases):
    return run_cases({name: make_case(*case, evaluate=True) for name, case in CASES.items()}, "cpu")


@pytest.fixture(scope="module")
def together(run_cases):
    half = {"per_device_train_batch_size": 4}
    cases = {name: make_case(*case, arguments=half, evaluate=True) for name, case in CASES.items()}
    return run_cases(cases, "ddp")


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_as_one(alone, together, case):
    expected = Result.load(alone / case)
    _, method = CASES[case]
    # An activation that lies between two levels, but for rounding, falls to either of them
    tolerance = 1e-3 if "activations" in METHODS[method] else 1e-5
    for rank in range(2):
        result = Result.load(together / case, rank)
        assert result.logged("loss") == pytest.approx(expected.logged("loss"), abs=1e-5)
        assert result.eval_loss == pytest.approx(expected.eval_loss, abs=tolerance)
        assert_close(result.weights, expected.weights)


@pytest.mark.parametrize("case", CASES)
def test_processes_end_with_the_same_codes(together, case):
    first, second = (Result.load(together / case, rank) for rank in range(2))
    assert_same(first.weights, second.weights)


@pytest.mark.parametrize("method", ["dkm", "lsq"])
@pytest.mark.parametrize(("config", "fsdp2", "message"), [("fsdp2", False, "use DDP"), ("ddp", True, "cut by FSDP2")])
def test_cut_weights_are_refused(run_cases, config, fsdp2, message, method):
    directory = run_cases({"llama": make_case("llama", method, fsdp2=fsdp2)}, config)
    error = json.loads((directory / "llama" / "result-0.json").read_text())["error"]
    assert "ValueError" in error
    assert message in error
