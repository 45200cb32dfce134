from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import cross_entropy
from training_cases import (
    MODELS,
    assert_close,
    assert_same,
    l_inf_subgradient,
    l_inf_sum,
    logged,
    make_bert,
    make_data,
    make_fixed_norm_resnet,
    make_resnet,
    snapshot,
)
from transformers import Trainer
from transformers.trainer_utils import HPSearchBackend

from hf_r2 import R2Mixin, RangeLoss

LEARNING_RATE, STRENGTH = 0.1, 0.5


class ClassWeightedTrainer(Trainer):
    """A trainer with a loss of its own, a mean over the micro-batch."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="none").mul(1 + labels).mean()
        return (loss, outputs) if return_outputs else loss


class R2ClassWeightedTrainer(R2Mixin, ClassWeightedTrainer):
    """The same with range regularization."""


class DeclaredMeanTrainer(ClassWeightedTrainer):
    """The same, and it says so: Trainer divides by the accumulation steps."""

    loss_is_scaled_for_ga = False


class R2DeclaredMeanTrainer(R2Mixin, DeclaredMeanTrainer):
    """The same with range regularization."""


class DeclaredShareTrainer(ClassWeightedTrainer):
    """The same, divided by the accumulation steps already, and it says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class R2DeclaredShareTrainer(R2Mixin, DeclaredShareTrainer):
    """The same with range regularization."""


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("plain_class", "r2_class"),
    [
        (ClassWeightedTrainer, R2ClassWeightedTrainer),
        (DeclaredMeanTrainer, R2DeclaredMeanTrainer),
        (DeclaredShareTrainer, R2DeclaredShareTrainer),
    ],
)
@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet"])
def test_mixin_regularizes_another_trainer_once_per_step(train, name, plain_class, r2_class, accumulation):
    data = make_data(name, 32)
    settings = {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    start = MODELS[name]()
    plain = train(MODELS[name](), data, plain_class, learning_rate=LEARNING_RATE, per_device_train_batch_size=32)
    ours = train(MODELS[name](), data, r2_class, learning_rate=LEARNING_RATE, r2_strength=STRENGTH, **settings)
    expected = {
        key: plain.model.state_dict()[key] - LEARNING_RATE * STRENGTH * gradient
        for key, gradient in l_inf_subgradient(start).items()
    }
    assert_close(dict(ours.model.named_parameters()), expected, atol=1e-6)
    assert logged(ours, "task_loss") == pytest.approx(logged(plain), abs=1e-5)


def test_mixin_with_a_trainer_that_gets_its_outputs_back(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 8), R2ClassWeightedTrainer, r2_strength=STRENGTH)
    inputs = trainer.data_collator(make_data("bert", 8))
    trainer.model.train()
    loss, outputs = trainer.compute_loss(trainer.model, dict(inputs), return_outputs=True)
    assert outputs.logits.shape == (8, 3)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, dict(inputs)))
    trainer.model.eval()
    task_loss = trainer.compute_loss(trainer.model, dict(inputs))
    assert loss.item() - task_loss.item() == pytest.approx(STRENGTH * l_inf_sum(trainer.model), rel=1e-5)


def looks_at(range_loss, model):
    """Whether the range loss reads exactly this model's weights."""
    parameters = dict(model.named_parameters())
    return all(getattr(*owner) is parameters[name] for name, owner in range_loss.selection.items())


def test_model_init_regularizes_the_model_being_trained(make_trainer):
    start, data, options = make_bert(), make_data("bert", 32), {"r2_loss": "margin", "r2_strength": STRENGTH}
    trainer_kwargs = {"model_init": lambda: deepcopy(start)}
    trainer = make_trainer(None, data, trainer_kwargs=trainer_kwargs, **options)
    reference = make_trainer(deepcopy(start), data, **options)
    reference.train()
    previous = trainer.model
    assert looks_at(trainer.range_loss, previous)
    for _ in range(2):
        trainer.train()
        assert trainer.model is not previous
        assert looks_at(trainer.range_loss, trainer.model)
        assert_same(snapshot(trainer.model), snapshot(reference.model))
        assert_same(snapshot(trainer.range_loss), snapshot(reference.range_loss))
        previous = trainer.model


@pytest.mark.parametrize("initial", [{"r2_strength": 0.0}, {"r2_strength": STRENGTH, "r2_loss": "tail"}], ids=str)
def test_hyperparameter_trial_trains_with_its_own_r2_arguments(make_trainer, monkeypatch, initial):
    """Trainer sets a trial's values on the arguments only after it has built the trial's model."""
    monkeypatch.setattr("transformers.integrations.hp_params", lambda trial: trial.params)
    start, data, values = make_bert(), make_data("bert", 16), {"r2_strength": STRENGTH, "r2_loss": "l_inf"}
    trainer_kwargs = {"model_init": lambda: deepcopy(start)}
    trainer = make_trainer(None, data, trainer_kwargs=trainer_kwargs, **initial)
    trainer.hp_search_backend = HPSearchBackend.OPTUNA
    trainer.hp_space = lambda trial: trial.params
    trainer.train(trial=SimpleNamespace(number=0, params=values))
    reference = make_trainer(deepcopy(start), data, **values)
    reference.train()
    assert_same(snapshot(trainer.model), snapshot(reference.model))


def test_range_loss_reads_the_trained_model(make_trainer):
    trainer = make_trainer(make_resnet(), make_data("resnet", 8), r2_strength=STRENGTH)
    assert looks_at(trainer.range_loss, trainer.model)


def test_range_loss_in_a_bare_loop_gives_the_same_weights(make_trainer):
    """One process, no accumulation: the module and the trainer are the same regularizer."""
    data = make_data("fixed_norm_resnet", 8)
    trainer = make_trainer(make_fixed_norm_resnet(), data, r2_strength=STRENGTH)
    trainer.train()
    model = make_fixed_norm_resnet().train()
    batch = trainer.data_collator(data)
    (model(**batch).loss + STRENGTH * RangeLoss(model)()).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
    assert_close(dict(trainer.model.named_parameters()), dict(model.named_parameters()), atol=1e-6)
