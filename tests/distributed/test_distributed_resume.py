from dataclasses import replace

import pytest
from safetensors.torch import load_file
from trainer_cases import Case, Result
from training_cases import assert_same

pytestmark = pytest.mark.slow

METHODS = {
    "margin": {"r2_loss": "margin", "r2_strength": 0.1, "r2_learning_rate": 0.1},
    "auto": {"r2_strength": "auto", "r2_target_crest": 1.8},
    "auto_margin": {"r2_loss": "margin", "r2_learning_rate": 0.1, "r2_strength": "auto", "r2_target_crest": 1.8},
    "auto_gradient_ratio": {"r2_strength": "auto", "r2_target_gradient_ratio": 0.5},
}
COMMON = {"max_steps": 6, "optim": "adamw_torch", "learning_rate": 0.01, "per_device_train_batch_size": 4}
SAVING = {"save_strategy": "steps", "save_steps": 3}
# transformers does not resume with FSDP2 of its own
CONFIGS = ["ddp", "fsdp2"]
NAMES = [
    f"{config}-{model}-{method}" for config in CONFIGS for model in ["bert_regression", "gpt2"] for method in METHODS
]


@pytest.fixture(scope="module")
def results(run_cases):
    """Find the results of both processes: of straight trainings, and of those resumed from a checkpoint of others."""
    directories = {}
    for config in CONFIGS:
        cases = {}
        for name in NAMES:
            started_with, model, method = name.split("-")
            if started_with == config:
                straight = Case(model, {**COMMON, **METHODS[method]})
                cases[f"{name}-straight"] = straight
                cases[f"{name}-interrupted"] = replace(straight, arguments={**straight.arguments, **SAVING})
                cases[f"{name}-resumed"] = replace(straight, resume=f"{name}-interrupted/checkpoint-3")
        directories |= dict.fromkeys(cases, run_cases(cases, config))
    return lambda name: [Result.load(directories[name] / name, rank) for rank in range(2)]


@pytest.mark.parametrize("name", NAMES)
def test_resumed_training_ends_as_a_straight_one(results, name):
    for straight, resumed in zip(results(f"{name}-straight"), results(f"{name}-resumed"), strict=True):
        assert resumed.logged("step") == [1, 2, 3, 4, 5, 6]
        assert resumed.learned
        assert_same(resumed.learned, straight.learned)
        assert_same(resumed.weights, straight.weights)


@pytest.mark.parametrize("name", NAMES)
def test_checkpoints_hold_whole_weights(results, name):
    (interrupted, _) = results(f"{name}-interrupted")
    saved = load_file(interrupted.directory / "checkpoint-6" / "model.safetensors")
    # The output layer of GPT-2 is its embedding, and may be saved once or twice
    assert interrupted.weights.keys() - saved.keys() <= {"lm_head.weight"}
    assert_same(saved, {key: interrupted.weights[key] for key in saved})


@pytest.mark.parametrize("name", NAMES)
def test_learned_values_change(results, name):
    assert results(f"{name}-straight")[0].change > 1e-3
