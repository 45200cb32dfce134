"""Compression-aware training over two processes: with DDP that of one process, with FSDP2 refused before training."""

import json

import pytest
from trainer_cases import Case, Result
from training_cases import assert_close, assert_same

pytestmark = pytest.mark.slow

MODELS = ["bert_regression", "gpt2"]
AWARE = {"r2_aware": "dkm", "r2_mode": "clip", "r2_clip": 1.5, "r2_aware_start_ratio": 0.25}


@pytest.fixture(scope="module")
def alone(run_cases):
    return run_cases({model: Case(model, AWARE, evaluate=True) for model in MODELS}, "single")


@pytest.fixture(scope="module")
def together(run_cases):
    halves = {**AWARE, "per_device_train_batch_size": 4}
    return run_cases({model: Case(model, halves, evaluate=True) for model in MODELS}, "ddp")


@pytest.mark.parametrize("model", MODELS)
def test_two_processes_train_as_one(alone, together, model):
    expected = Result.load(alone / model)
    for rank in range(2):
        result = Result.load(together / model, rank)
        assert result.logged("loss") == pytest.approx(expected.logged("loss"), abs=1e-5)
        assert result.eval_loss == pytest.approx(expected.eval_loss, abs=1e-5)
        assert_close(result.weights, expected.weights)


@pytest.mark.parametrize("model", MODELS)
def test_processes_end_with_the_same_codes(together, model):
    first, second = (Result.load(together / model, rank) for rank in range(2))
    assert_same(first.weights, second.weights)


@pytest.mark.parametrize(("config", "fsdp2", "message"), [("fsdp2", False, "use DDP"), ("ddp", True, "cut by FSDP2")])
def test_cut_weights_are_refused(run_cases, config, fsdp2, message):
    directory = run_cases({"llama": Case("llama", AWARE, fsdp2=fsdp2)}, config)
    error = json.loads((directory / "llama" / "result-0.json").read_text())["error"]
    assert "ValueError" in error
    assert message in error
