import pytest
import torch
from safetensors import safe_open
from training_cases import (
    R2ZeroTaskTrainer,
    assert_same,
    make_bert,
    make_data,
    make_resnet,
    regularized_weights,
    snapshot,
)
from transformers import TrainerCallback

LEARNABLE = ["margin", "soft_min_max"]


@pytest.mark.parametrize("loss", LEARNABLE)
def test_learnable_values_move_one_for_every_weight(train, loss):
    start = make_bert()
    trainer = train(start, make_data("bert", 32), r2_loss=loss, r2_strength=0.5, r2_learning_rate=0.1)
    fresh = train(make_bert(), make_data("bert", 8), r2_loss=loss, r2_strength=0.5, r2_learning_rate=0.0)
    assert len(trainer.range_loss.learnable) == len(regularized_weights(start))
    for name, value in trainer.range_loss.learnable.items():
        assert value.shape == (1,)
        assert not torch.equal(value, fresh.range_loss.learnable[name])


@pytest.mark.parametrize("accumulation", [1, 4])
def test_margins_take_sgd_steps_with_their_own_learning_rate(train, accumulation):
    """Nothing stands outside the first margins, so each gets the gradient 1 · strength, once per optimizer step."""
    trainer = train(
        make_bert(),
        make_data("bert", 16),
        R2ZeroTaskTrainer,
        per_device_train_batch_size=16 // accumulation,
        gradient_accumulation_steps=accumulation,
        r2_loss="margin",
        r2_strength=0.5,
        r2_learning_rate=2**-7,
    )
    for name, weight in regularized_weights(make_bert()).items():
        margin = trainer.range_loss.learnable[name.replace(".", "/")]
        assert torch.equal(margin.detach(), weight.abs().max()[None] - 2**-7 * 0.5)


@pytest.mark.parametrize("loss", LEARNABLE)
@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
def test_weight_decay_does_not_reach_learnable_values(train, loss, optim):
    options = {"r2_loss": loss, "r2_strength": 0.5, "r2_temperature": 5.0, "optim": optim, "weight_decay": 5.0}
    still = train(make_bert(), make_data("bert", 16), R2ZeroTaskTrainer, r2_learning_rate=0.0, **options)
    for name, value in still.range_loss.learnable.items():
        start = 5.0 if loss == "soft_min_max" else make_bert().state_dict()[name.replace("/", ".")].abs().max().item()
        assert value.item() == start
    embedding = "bert.embeddings.word_embeddings.weight"
    torch.testing.assert_close(still.model.state_dict()[embedding], 0.25 * make_bert().state_dict()[embedding])


@pytest.mark.parametrize("loss", LEARNABLE)
def test_first_step_of_learnable_values_ignores_weight_decay(train, loss):
    options = {"r2_loss": loss, "r2_strength": 0.5, "r2_learning_rate": 0.1}
    data = make_data("bert", 8)
    without, with_decay = (
        train(make_bert(), data, R2ZeroTaskTrainer, weight_decay=decay, **options) for decay in (0.0, 5.0)
    )
    assert without.state.global_step == 1
    assert_same(snapshot(with_decay.range_loss), snapshot(without.range_loss))


@pytest.mark.parametrize("loss", LEARNABLE)
@pytest.mark.parametrize("grain", ["tensor", "channel", 5])
def test_learnable_values_stay_out_of_the_model_and_its_file(train, tmp_path, loss, grain):
    names = set(make_resnet().state_dict())
    trainer = train(make_resnet(), make_data("resnet", 8), r2_loss=loss, r2_strength=0.1, r2_grain=grain)
    assert set(trainer.model.state_dict()) == names
    trainer.save_model(tmp_path / "saved")
    with safe_open(tmp_path / "saved" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    optimized = {id(parameter) for group in trainer.optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in trainer.model.parameters()}


def test_gradients_of_learnable_values_do_not_pile_up(train):
    trainer = train(make_bert(), make_data("bert", 32), r2_loss="margin", r2_strength=0.5)
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in trainer.range_loss.parameters())


def test_every_training_starts_from_the_range_as_it_is(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 16), r2_loss="margin", r2_strength=0.5, r2_learning_rate=0.1)
    starts = []

    class Note(TrainerCallback):
        def on_train_begin(self, args, state, control, model=None, **kwargs):
            ranges = {name.replace(".", "/"): w.abs().max().item() for name, w in regularized_weights(model).items()}
            starts.append(({name: level.item() for name, level in trainer.range_loss.learnable.items()}, ranges))

    trainer.add_callback(Note())
    trainer.train()
    trainer.train()
    assert len(starts) == 2
    assert all(levels == ranges for levels, ranges in starts)
    assert starts[0] != starts[1]
