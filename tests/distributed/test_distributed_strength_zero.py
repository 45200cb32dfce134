import itertools
from dataclasses import replace

import pytest
from trainer_cases import DISTRIBUTIONS, Case, Result
from training_cases import assert_same

pytestmark = pytest.mark.slow

# Trainer multiplies a loss that is a mean over the batch by the processes, unless it is told what the loss is.
# R2Trainer does not, with any strength
PLAIN = {"gpt2": "Trainer", "llama": "Trainer", "bert": "MeanLossTrainer", "fixed_norm_resnet": "MeanLossTrainer"}
OFF = {"strength_0": {"r2_strength": 0}, "prox_0": {"r2_mode": "prox", "r2_strength": 0}, "none": {"r2_mode": "none"}}
NAMES = [
    (distribution, model)
    for distribution, model in itertools.product(DISTRIBUTIONS, PLAIN)
    if distribution == "ddp" or model != "fixed_norm_resnet"
]


@pytest.fixture(scope="module")
def find(run_cases):
    """Find the results of both processes."""
    directories = {}
    for config in ["ddp", "fsdp2"]:
        cases = {}
        for distribution, model in NAMES:
            if DISTRIBUTIONS[distribution][0] == config:
                common = {"per_device_train_batch_size": 4, "max_grad_norm": 1.0}
                plain = Case(model, common, DISTRIBUTIONS[distribution][1], trainer=PLAIN[model], evaluate=True)
                cases[f"{distribution}-{model}-plain"] = plain
                for name, arguments in {**OFF, "restricted": {"r2_strength": 0.001}}.items():
                    case = replace(plain, trainer="R2Trainer", arguments={**common, **arguments})
                    cases[f"{distribution}-{model}-{name}"] = case
        directories |= dict.fromkeys(cases, run_cases(cases, config))
    return lambda name: [Result.load(directories[name] / name, rank) for rank in range(2)]


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize(("distribution", "model"), NAMES)
def test_without_restriction_it_is_plain_trainer_bit_for_bit(find, distribution, model, off):
    name = f"{distribution}-{model}"
    for plain, ours in zip(find(f"{name}-plain"), find(f"{name}-{off}"), strict=True):
        assert ours.processes == 2
        assert len(ours.logs) == 4
        assert ours.logged("loss") == plain.logged("loss")
        assert ours.logged("grad_norm") == plain.logged("grad_norm")
        assert ours.eval_loss == plain.eval_loss
        assert_same(ours.weights, plain.weights)


@pytest.mark.parametrize(("distribution", "model"), NAMES)
def test_a_small_strength_changes_the_weights(find, distribution, model):
    plain, restricted = (find(f"{distribution}-{model}-{part}")[0].weights for part in ("plain", "restricted"))
    assert any(not plain[name].equal(restricted[name]) for name in plain)
