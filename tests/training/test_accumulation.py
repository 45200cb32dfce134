import logging

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from training_cases import (
    MODELS,
    assert_close,
    assert_same,
    logged,
    make_bert,
    make_data,
    make_resnet,
    snapshot,
    train_logs,
)
from transformers import BertForSequenceClassification, MixtralConfig, MixtralForCausalLM, Trainer
from transformers.utils import logging as transformers_logging

from hf_r2 import R2Mixin
from hf_r2.losses import RANGE_LOSSES

WARNING = "number of items"


@pytest.fixture
def warnings_of(caplog):
    """Lists the correction's warnings so far."""
    transformers_logging.enable_propagation()
    caplog.set_level(logging.WARNING)
    yield lambda: [record for record in caplog.records if WARNING in record.getMessage()]
    transformers_logging.disable_propagation()


def settings(batch, accumulation):
    return {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}


@pytest.mark.parametrize("optimizer", [{"optim": "sgd"}, {"optim": "adamw_torch", "learning_rate": 0.01}], ids=str)
@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet", "llama", "gpt2"])
def test_trajectory_does_not_depend_on_accumulation(train, name, optimizer):
    """80 examples: windows of 32, 32 and 16, the last of them half as many micro-batches."""
    data = make_data(name, 80)
    options = {"num_train_epochs": 2, "r2_strength": 0.05, "adam_epsilon": 1e-3, **optimizer}
    whole = train(MODELS[name](), data, **settings(32, 1), **options)
    assert len(logged(whole)) == 6
    for parts in ((16, 2), (8, 4)):
        cut = train(MODELS[name](), data, **settings(*parts), **options)
        assert_close(snapshot(cut.model), snapshot(whole.model))
        for key in ("loss", "task_loss", "r2_loss", "crest_factor"):
            assert logged(cut, key) == pytest.approx(logged(whole, key), abs=1e-5)


@pytest.mark.parametrize("loss", RANGE_LOSSES)
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_trajectory_of_every_range_loss_does_not_depend_on_accumulation(train, name, loss):
    data = make_data(name, 80)
    strength = 1e-4 if loss == "kurtosis" else 0.05
    options = {"num_train_epochs": 2, "r2_loss": loss, "r2_strength": strength, "r2_learning_rate": 0.5}
    whole = train(MODELS[name](), data, **settings(32, 1), **options)
    cut = train(MODELS[name](), data, **settings(8, 4), **options)
    assert_close(snapshot(cut.model), snapshot(whole.model))
    assert_close(snapshot(cut.range_loss), snapshot(whole.range_loss))
    assert logged(cut, "r2_loss") == pytest.approx(logged(whole, "r2_loss"), abs=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_clipped_gradients_do_not_depend_on_accumulation(train, smoothing):
    data = make_data("bert", 80)
    options = {"max_grad_norm": 0.1, "r2_strength": 0.1, "label_smoothing_factor": smoothing}
    whole = train(make_bert(), data, **settings(32, 1), **options)
    cut = train(make_bert(), data, **settings(8, 4), **options)
    assert_close(snapshot(cut.model), snapshot(whole.model))
    assert logged(cut, "grad_norm") == pytest.approx(logged(whole, "grad_norm"), rel=1e-4)


@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet"])
def test_plain_trainer_multiplies_the_task_loss_and_ours_does_not(train, name):
    data = make_data(name, 32)
    plain = [logged(train(MODELS[name](), data, Trainer, **settings(*parts)))[0] for parts in ((32, 1), (8, 4))]
    ours = [
        logged(train(MODELS[name](), data, r2_strength=0.1, **settings(*parts)), "task_loss")[0]
        for parts in ((32, 1), (8, 4))
    ]
    assert plain[1] / plain[0] == pytest.approx(4, rel=1e-3), "fixed upstream: the correction may go"
    assert ours == pytest.approx([plain[0]] * 2, abs=1e-5)


@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet"])
def test_the_correction_warns_once(train, warnings_of, name):
    trainer = train(MODELS[name](), make_data(name, 32), num_train_epochs=2, r2_strength=0.1, **settings(4, 4))
    trainer.train()
    assert len(warnings_of()) == 1
    assert type(trainer.model).__name__ in warnings_of()[0].getMessage()


def test_an_evaluation_before_training_does_not_warn_again(make_trainer, warnings_of):
    data = make_data("bert", 32)
    trainer = make_trainer(make_bert(), data, r2_strength=0.1, **settings(4, 4))
    trainer.evaluate(data)
    trainer.train()
    assert len(warnings_of()) == 1


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_causal_language_models_are_left_alone(train, warnings_of, name):
    data = make_data(name, 32)
    trainer = train(MODELS[name](), data, r2_strength=0.1, **settings(4, 4))
    plain = train(MODELS[name](), data, Trainer, **settings(4, 4))
    assert trainer.model_accepts_loss_kwargs
    assert warnings_of() == []
    assert logged(trainer, "task_loss")[0] == pytest.approx(logged(plain)[0], abs=1e-6)


def test_tokens_of_uneven_sequences_still_count_alike(train):
    """Left alone means averaged over the tokens of the whole optimizer step, which a mean of means is not."""
    data = make_data("llama", 32)
    for index, example in enumerate(data):
        labels = example["input_ids"].clone()
        labels[: index % 7] = -100
        example["labels"] = labels
    whole = train(MODELS["llama"](), data, r2_strength=0.1, **settings(32, 1))
    cut = train(MODELS["llama"](), data, r2_strength=0.1, **settings(4, 8))
    assert_close(snapshot(cut.model), snapshot(whole.model))


def test_an_auxiliary_loss_beside_the_token_loss_leaves_it_alone(train, warnings_of):
    """A mixture of experts divides its token loss by the items, and adds a router loss that it does not divide."""
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            num_local_experts=4,
            output_router_logits=True,
        )
    )
    trainer = train(model, make_data("mixtral", 32), r2_strength=0.1, **settings(8, 4))
    assert trainer.model_accepts_loss_kwargs
    assert warnings_of() == []


def test_without_accumulation_nothing_is_probed(train, warnings_of):
    trainer = train(make_bert(), make_data("bert", 16), r2_strength=0.1)
    assert trainer.model_accepts_loss_kwargs
    assert warnings_of() == []


@pytest.mark.parametrize("labels", ["none", "first"])
def test_a_loss_of_zero_tells_nothing(make_trainer, labels):
    """A micro-batch without targets has the loss 0 whatever it is divided by: that is no reason to correct."""
    trainer = make_trainer(MODELS["llama"](), make_data("llama", 8), r2_strength=0.1, **settings(4, 2))
    batch = trainer.data_collator(make_data("llama", 4))
    batch["labels"][:, (0 if labels == "none" else 1) :] = -100
    assert trainer._heeds_item_count(batch)


class DeclaredTrainer(Trainer):
    """A trainer that says that its loss is a mean over the micro-batch: plain Trainer divides it as it should."""

    loss_is_scaled_for_ga = False


class R2DeclaredTrainer(R2Mixin, DeclaredTrainer):
    """The same with range regularization."""


def test_a_trainer_that_declares_its_scaling_is_not_warned_about(train, warnings_of):
    data = make_data("bert", 32)
    plain = train(make_bert(), data, DeclaredTrainer, **settings(8, 4))
    ours = train(make_bert(), data, R2DeclaredTrainer, r2_strength=0.1, **settings(8, 4))
    assert logged(ours, "task_loss") == pytest.approx(logged(plain), abs=1e-5)
    assert warnings_of() == []


@pytest.mark.parametrize(("name", "batch"), [("dropout_bert", (4, 4)), ("resnet", (8, 2))])
def test_probing_does_not_touch_a_trajectory_with_dropout_or_batch_norm(train, make_trainer, name, batch):
    data = make_data(name, 32)
    probed = train(MODELS[name](), data, r2_strength=0.1, **settings(*batch))
    told = make_trainer(MODELS[name](), data, r2_strength=0.1, **settings(*batch))
    told._probed, told.model_accepts_loss_kwargs = True, False
    told.train()
    assert_same(snapshot(probed.model), snapshot(told.model))
    assert logged(probed) == logged(told)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("name", "heeds"), [("resnet", False), ("bert", False), ("dropout_bert", False), ("llama", True), ("gpt2", True)]
)
def test_probe_answers_and_leaves_no_trace(make_trainer, name, heeds, training):
    trainer = make_trainer(MODELS[name](), make_data(name, 8), r2_strength=0.1, **settings(4, 2))
    batch = trainer.data_collator(make_data(name, 4))
    keys = set(batch)
    trainer.model.train(training)
    flags = [module.training for module in trainer.model.modules()]
    weights, rng = snapshot(trainer.model), torch.get_rng_state()
    assert trainer._heeds_item_count(batch) is heeds
    assert torch.equal(torch.get_rng_state(), rng)
    assert_same(snapshot(trainer.model), weights)
    assert [module.training for module in trainer.model.modules()] == flags
    assert all(parameter.grad is None for parameter in trainer.model.parameters())
    assert set(batch) == keys


class NoisyBertForSequenceClassification(BertForSequenceClassification):
    """A model that draws random numbers in evaluation as well, as masked autoencoders do."""

    def forward(self, *args, **kwargs):
        torch.rand(3)
        return super().forward(*args, **kwargs)


def test_probe_gives_back_the_random_numbers_that_it_draws(make_trainer):
    model = NoisyBertForSequenceClassification(make_bert().config)
    trainer = make_trainer(model, make_data("bert", 8), r2_strength=0.1, **settings(4, 2))
    rng = torch.get_rng_state()
    assert not trainer._heeds_item_count(trainer.data_collator(make_data("bert", 4)))
    assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_the_loss_is_asked_once_in_a_training(make_trainer, monkeypatch, name):
    trainer = make_trainer(MODELS[name](), make_data(name, 32), r2_strength=0.1, num_train_epochs=2, **settings(4, 2))
    ask, asked = trainer._heeds_item_count, []
    monkeypatch.setattr(trainer, "_heeds_item_count", lambda batch: asked.append(batch) or ask(batch))
    trainer.train()
    assert len(asked) == 1


def test_an_own_loss_function_is_not_asked(make_trainer, monkeypatch):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    options = {"trainer_kwargs": {"compute_loss_func": loss_function}, "r2_strength": 0.1, **settings(4, 2)}
    trainer = make_trainer(make_bert(), make_data("bert", 16), **options)
    monkeypatch.setattr(trainer, "_heeds_item_count", lambda batch: pytest.fail("asked"))
    trainer.train()


def test_probe_restores_the_mode_when_the_forward_fails(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 8), r2_strength=0.1)
    trainer.model.train()
    with pytest.raises(IndexError):
        trainer._heeds_item_count({"input_ids": torch.full((1, 4), 10**6), "labels": torch.tensor([0])})
    assert trainer.model.training


def test_probe_with_label_smoothing_keeps_the_labels(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 8), r2_strength=0.1, label_smoothing_factor=0.1)
    batch = trainer.data_collator(make_data("bert", 4))
    trainer._heeds_item_count(batch)
    assert "labels" in batch


def test_accumulated_batch_norm_statistics_are_those_of_plain_trainer(train):
    """Zero learning rate: the running statistics depend on the micro-batches alone."""
    data = make_data("resnet", 32)
    plain = train(make_resnet(), data, Trainer, learning_rate=0.0, **settings(8, 2))
    ours = train(make_resnet(), data, learning_rate=0.0, r2_strength=0.1, **settings(8, 2))
    assert_same(snapshot(ours.model), snapshot(plain.model))
    assert any(module.num_batches_tracked == 4 for module in ours.model.modules() if isinstance(module, nn.BatchNorm2d))


def test_steps_are_numbered_alike_with_an_uneven_last_window(train):
    trainer = train(make_bert(), make_data("bert", 28), r2_strength=0.1, num_train_epochs=2, **settings(4, 4))
    assert [entry["step"] for entry in train_logs(trainer)] == [1, 2, 3, 4]
