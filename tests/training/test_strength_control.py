"""`r2_strength="auto"` in whole trainings: how near each weight comes to its target, and from what."""

import math

import pytest
import torch
from training_cases import (
    MODELS,
    R2ZeroTaskTrainer,
    assert_same,
    logged,
    make_bert,
    make_data,
    make_gpt2,
    regularized_weights,
    snapshot,
)
from transformers import TrainerCallback

from hf_r2.losses import RangeLoss
from hf_r2.projection import prox_l_inf
from hf_r2.selection import output_first, select_weights
from hf_r2.training.strength import FIRST_STRENGTH

AUTO = {"r2_strength": "auto", "learning_rate": 0.05}


def crests(model):
    return {name: (w.abs().max() / w.square().mean().sqrt()).item() for name, w in regularized_weights(model).items()}


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"r2_loss": "l_inf"}, 2.0),
        ({"r2_loss": "soft_min_max"}, 2.0),
        ({"r2_loss": "tail"}, 1.5),
        ({"r2_mode": "prox"}, 1.5),
        ({"r2_mode": "prox"}, 2.0),
        pytest.param(
            # The strengths it takes to move Adam's weights are reached slowly: 26 % off after 300 steps
            {"r2_mode": "prox", "optim": "adamw_torch", "learning_rate": 1e-3, "max_steps": 1000},
            1.5,
            marks=pytest.mark.slow,
        ),
    ],
    ids=str,
)
def test_every_weight_comes_near_the_target(train, options, target):
    settings = {**AUTO, "max_steps": 300, "logging_steps": 100, "r2_target_crest": target, **options}
    trainer = train(make_gpt2(), make_data("gpt2", 64), **settings)
    found = crests(trainer.model)
    assert min(crests(make_gpt2()).values()) > 1.2 * target
    assert list(found.values()) == pytest.approx([target] * len(found), rel=0.12)
    assert sum(found.values()) / len(found) == pytest.approx(target, rel=0.08)
    strengths = trainer.strength_target.strengths
    assert strengths.shape == (len(found),)
    assert strengths.max() > 1.3 * strengths.min()


def test_a_target_below_what_l_inf_can_hold_leaves_no_new_outliers(train):
    settings = {**AUTO, "max_steps": 300, "logging_steps": 100, "r2_target_crest": 1.5}
    trainer = train(make_gpt2(), make_data("gpt2", 64), **settings)
    assert max(crests(trainer.model).values()) < max(crests(make_gpt2()).values())


class Note(TrainerCallback):
    """Notes the integral part of the chosen strengths before every step."""

    def __init__(self):
        self.states = []

    def on_step_begin(self, *args, **kwargs):
        self.states.append(self.trainer.strength_target.state.clone())


@pytest.mark.parametrize("mode", ["loss", "prox"])
def test_nothing_is_added_up_while_restriction_is_off(make_trainer, mode):
    note = Note()
    note.trainer = make_trainer(
        make_bert(), make_data("bert", 80), r2_mode=mode, r2_start_ratio=0.5, r2_target_crest=1.5, **AUTO
    )
    note.trainer.add_callback(note)
    note.trainer.train()
    assert note.states[5].tolist() == pytest.approx([math.log(FIRST_STRENGTH)] * len(note.states[5]))


def test_the_first_step_has_the_first_strength_times_the_factors(train):
    factors = {"*": 2.0, "*query*": 0.5, "classifier*": 0}
    trainer = train(make_bert(), make_data("bert", 8), r2_strength_factors=factors, r2_target_crest=2.0, **AUTO)
    largest = {name: weight.abs().max().item() for name, weight in regularized_weights(make_bert()).items()}
    expected = sum((0.5 if "query" in name else 2) * top for name, top in largest.items() if "classifier" not in name)
    assert logged(trainer, "r2_loss") == pytest.approx([FIRST_STRENGTH * expected], rel=1e-5)
    assert list(trainer.range_loss.selection) == [name for name in largest if "classifier" not in name]


def test_the_first_proximal_step_has_the_first_strength_times_the_factors(train):
    model, settings = make_bert(), {**AUTO, "learning_rate": 0.5, "r2_target_crest": 2.0, "r2_mode": "prox"}
    train(model, make_data("bert", 8), R2ZeroTaskTrainer, r2_strength_factors={"*query*": 3.0}, **settings)
    for name, (module, attribute) in select_weights(make_bert()).items():
        t = 0.5 * FIRST_STRENGTH * (3 if "query" in name else 1)
        expected = prox_l_inf(output_first(module, getattr(module, attribute)), t)
        torch.testing.assert_close(model.get_parameter(name).detach(), expected.detach(), rtol=1e-6, atol=1e-8)


@pytest.fixture
def ratios(monkeypatch):
    """Norm of the R2 gradient over the task's, by optimizer step, one per weight of the model."""
    found, accumulate = [], RangeLoss.accumulate_grad_

    def noted(self, *args):
        weights = [getattr(*owner) for owner in self.selection.values()]
        before = [weight.grad.clone() for weight in weights]
        accumulate(self, *args)
        pairs = zip(weights, before, strict=True)
        found.append(torch.stack([(weight.grad - task).norm() / task.norm() for weight, task in pairs]))

    monkeypatch.setattr(RangeLoss, "accumulate_grad_", noted)
    return found


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss", ["l_inf", "soft_min_max", "kurtosis"])
@pytest.mark.parametrize("name", ["bert", "gpt2"])
def test_the_gradient_ratio_is_held_from_the_second_step_on(train, ratios, name, loss, accumulation):
    options = {"r2_strength": "auto", "r2_target_gradient_ratio": 0.2, "r2_loss": loss, "num_train_epochs": 4}
    options |= {"per_device_train_batch_size": 16 // accumulation, "gradient_accumulation_steps": accumulation}
    train(MODELS[name](), make_data(name, 16), learning_rate=0.0, r2_learning_rate=0.0, **options)
    assert not ratios[0].any()
    torch.testing.assert_close(torch.stack(ratios[1:]), torch.full((3, len(ratios[0])), 0.2), rtol=0.02, atol=0)


def test_the_gradient_ratio_is_held_on_average_while_training(train, ratios):
    options = {"r2_strength": "auto", "r2_target_gradient_ratio": 0.2, "max_steps": 100, "logging_steps": 50}
    train(make_gpt2(), make_data("gpt2", 64), learning_rate=0.05, **options)
    mean = torch.stack(ratios[50:]).mean(dim=0)
    assert mean.tolist() == pytest.approx([0.2] * len(mean), rel=0.15)


@pytest.mark.parametrize(
    "options",
    [
        {"r2_mode": "prox", "r2_target_crest": 1.5, "r2_warmup_ratio": 0.5},
        {"r2_loss": "soft_min_max", "r2_target_crest": 1.5, "r2_strength_factors": {"*query*": 2.0}},
        {"r2_loss": "l_inf", "r2_target_gradient_ratio": 0.2, "optim": "adamw_torch"},
    ],
    ids=str,
)
def test_resuming_is_the_straight_run_bit_for_bit(make_trainer, options):
    settings = {**AUTO, "max_steps": 6, "save_strategy": "steps", "save_steps": 3, **options}
    straight, resumed = (make_trainer(make_bert(), make_data("bert", 24), **settings) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-3")
    assert_same(snapshot(resumed.model), snapshot(straight.model))
    assert logged(resumed, "r2_strength") == logged(straight, "r2_strength")
    assert len(set(logged(straight, "r2_strength"))) == 6
