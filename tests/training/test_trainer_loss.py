import pytest
import torch
from torch.nn.functional import cross_entropy
from training_cases import (
    MODELS,
    R2ZeroTaskTrainer,
    assert_close,
    assert_same,
    l_inf_subgradient,
    l_inf_sum,
    logged,
    make_bert,
    make_data,
    regularized_weights,
    snapshot,
    train_logs,
)
from transformers import Trainer, TrainerCallback

from hf_r2 import losses
from hf_r2.losses import RANGE_LOSSES

LEARNING_RATE, STRENGTH = 0.1, 0.5


def summed_cross_entropy(outputs, labels, num_items_in_batch=None):
    return cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch


OWN_LOSS = {"trainer_kwargs": {"compute_loss_func": summed_cross_entropy}}


class BeforeStep(TrainerCallback):
    """Notes a quantity at the weights that each optimizer step starts from."""

    def __init__(self, quantity):
        self.quantity = quantity
        self.values = []

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        with torch.no_grad():
            self.values.append(float(self.quantity(model)))


class AfterStep(BeforeStep):
    """Notes a quantity at the weights that each optimizer step ends with."""

    def on_step_begin(self, *args, **kwargs):
        pass

    def on_step_end(self, args, state, control, model=None, **kwargs):
        BeforeStep.on_step_begin(self, args, state, control, model=model, **kwargs)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("bert", {}),
        ("fixed_norm_resnet", {}),
        ("llama", {}),
        ("gpt2", {}),
        ("bert", {"label_smoothing_factor": 0.2}),
        ("llama", {"label_smoothing_factor": 0.2}),
        ("bert", OWN_LOSS),
        ("fixed_norm_resnet", OWN_LOSS),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value) or "default",
)
def test_one_step_adds_the_subgradient_exactly_once(train, name, options, accumulation):
    data = make_data(name, 32)
    settings = {"per_device_train_batch_size": 32 // accumulation, "gradient_accumulation_steps": accumulation}
    start, reference = MODELS[name](), MODELS[name]()
    if accumulation > 1 and (options or name not in ("llama", "gpt2")):
        reference.accepts_loss_kwargs = False
    plain = train(reference, data, Trainer, learning_rate=LEARNING_RATE, **settings, **options)
    ours = train(MODELS[name](), data, learning_rate=LEARNING_RATE, r2_strength=STRENGTH, **settings, **options)
    assert ours.state.global_step == 1
    expected = {
        key: plain.model.state_dict()[key] - LEARNING_RATE * STRENGTH * gradient
        for key, gradient in l_inf_subgradient(start).items()
    }
    assert_close(dict(ours.model.named_parameters()), expected, atol=1e-6)
    assert logged(ours, "task_loss") == pytest.approx(logged(plain), abs=1e-5)
    assert logged(ours, "r2_loss") == pytest.approx([STRENGTH * l_inf_sum(start)], rel=1e-5)


@pytest.mark.parametrize("accumulation", [1, 2, 4])
@pytest.mark.parametrize("name", ["resnet", "bert", "llama", "gpt2"])
def test_without_a_task_every_step_is_the_subgradient_step_bit_for_bit(train, name, accumulation):
    """With 7 micro-batches the last window has 1 or 3 of them; all shares of 0.75 are exact in binary."""
    strength, learning_rate = 0.75, 0.25
    trainer = train(
        MODELS[name](),
        make_data(name, 28),
        R2ZeroTaskTrainer,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulation,
        learning_rate=learning_rate,
        r2_strength=strength,
    )
    expected = MODELS[name]()
    for _ in range(-(-7 // accumulation)):
        steps = l_inf_subgradient(expected)
        with torch.no_grad():
            for key, parameter in expected.named_parameters():
                parameter -= learning_rate * (strength * steps[key])
    assert trainer.state.global_step == -(-7 // accumulation)
    assert_same(
        {key: parameter.detach() for key, parameter in trainer.model.named_parameters()},
        {key: parameter.detach() for key, parameter in expected.named_parameters()},
    )


@pytest.mark.parametrize(
    "selection", [{"r2_include": ["classifier*"]}, {"r2_exclude": ["bert.*"]}, {"r2_min_numel": 500}], ids=str
)
def test_only_the_selected_weights_are_pulled(train, selection):
    before = snapshot(make_bert())
    trainer = train(make_bert(), make_data("bert", 8), R2ZeroTaskTrainer, r2_strength=STRENGTH, **selection)
    changed = {key for key, value in trainer.model.state_dict().items() if not torch.equal(value, before[key])}
    if "r2_min_numel" in selection:
        assert changed == {key for key, weight in regularized_weights(trainer.model).items() if weight.numel() >= 500}
    else:
        assert changed == {"classifier.weight"}


def test_channel_grain_pulls_the_largest_weight_of_every_channel(train):
    before = snapshot(make_bert())
    trainer = train(
        make_bert(), make_data("bert", 8), R2ZeroTaskTrainer, r2_strength=0.5, learning_rate=0.25, r2_grain="channel"
    )
    for key in regularized_weights(trainer.model):
        weight = before[key]
        largest = weight.abs() == weight.abs().amax(dim=1, keepdim=True)
        assert torch.equal(trainer.model.state_dict()[key], weight - 0.25 * (0.5 * largest * weight.sign()))


@pytest.mark.parametrize("loss", RANGE_LOSSES)
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_logged_parts_add_up_and_r2_loss_is_that_before_the_step(make_trainer, name, loss):
    trainer = make_trainer(MODELS[name](), make_data(name, 32), r2_loss=loss, r2_strength=STRENGTH)
    before = BeforeStep(lambda model: STRENGTH * trainer.range_loss())
    trainer.add_callback(before)
    trainer.train()
    assert len(logged(trainer)) == 4
    assert logged(trainer, "r2_loss") == pytest.approx(before.values, rel=1e-5)
    sums = [entry["task_loss"] + entry["r2_loss"] for entry in train_logs(trainer)]
    assert sums == pytest.approx(logged(trainer), abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("name", ["resnet", "bert", "gpt2"])
def test_logged_r2_loss_is_strength_times_the_sum_of_largest_magnitudes(train, name, accumulation):
    before = BeforeStep(lambda model: STRENGTH * l_inf_sum(model))
    trainer = train(
        MODELS[name](),
        make_data(name, 32),
        trainer_kwargs={"callbacks": [before]},
        gradient_accumulation_steps=accumulation,
        r2_strength=STRENGTH,
    )
    assert len(before.values) == 4 // accumulation
    assert logged(trainer, "r2_loss") == pytest.approx(before.values, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "loss"),
    [
        ({"r2_loss": "tail", "r2_tail_fraction": 0.2}, lambda weight: losses.tail_mean(weight, 0.2)),
        ({"r2_loss": "tail", "r2_grain": "7"}, lambda weight: losses.tail_mean(weight, 0.01, 7)),
        ({"r2_loss": "soft_min_max", "r2_temperature": 2.0}, lambda weight: losses.soft_min_max(weight, 2.0)),
        ({"r2_loss": "l_inf", "r2_grain": "channel"}, lambda weight: losses.l_inf(weight, "channel")),
        ({"r2_loss": "l_inf", "r2_grain": 5}, lambda weight: losses.l_inf(weight, 5)),
        ({"r2_loss": "kurtosis"}, lambda weight: losses.kurtosis(weight, 1.8)),
    ],
    ids=["tail_fraction", "tail_grain", "temperature", "channel_grain", "int_grain", "kurtosis"],
)
def test_the_losses_own_arguments_reach_it(train, options, loss):
    trainer = train(make_bert(), make_data("bert", 8), r2_strength=0.01, **options)
    expected = 0.01 * sum(loss(weight).item() for weight in regularized_weights(make_bert()).values())
    assert logged(trainer, "r2_loss") == pytest.approx([expected], rel=1e-5)


@pytest.mark.parametrize("reduction", ["max", "sum"])
def test_the_margin_reduction_reaches_its_loss(make_trainer, reduction):
    trainer = make_trainer(make_bert(), make_data("bert", 8), r2_loss="margin", r2_margin_reduction=reduction)
    with torch.no_grad():
        for level in trainer.range_loss.learnable.values():
            level.fill_(0.01)
    parts = [
        losses.margin(weight, torch.tensor([0.01]), "tensor", reduction)
        for weight in regularized_weights(trainer.model).values()
    ]
    assert trainer.range_loss().item() == pytest.approx(sum(parts).item(), rel=1e-5)


def test_logs_average_over_the_logging_steps(train):
    before = BeforeStep(lambda model: STRENGTH * l_inf_sum(model))
    often = train(make_bert(), make_data("bert", 48), r2_strength=STRENGTH)
    seldom = train(
        make_bert(),
        make_data("bert", 48),
        trainer_kwargs={"callbacks": [before]},
        r2_strength=STRENGTH,
        logging_steps=3,
    )
    for key in ("loss", "task_loss", "r2_loss"):
        values = torch.tensor(logged(often, key)).view(2, 3).mean(dim=1)
        assert logged(seldom, key) == pytest.approx(values.tolist(), abs=1e-5)
    assert logged(seldom, "r2_loss") == pytest.approx(torch.tensor(before.values).view(2, 3).mean(dim=1).tolist())


@pytest.mark.parametrize("name", ["resnet", "bert", "gpt2"])
def test_logged_crest_factor_is_the_mean_of_max_over_rms(train, name):
    after = AfterStep(
        lambda model: torch.stack(
            [weight.abs().max() / weight.square().mean().sqrt() for weight in regularized_weights(model).values()]
        ).mean()
    )
    trainer = train(
        MODELS[name](), make_data(name, 32), trainer_kwargs={"callbacks": [after]}, r2_strength=0.2, learning_rate=0.02
    )
    assert logged(trainer, "crest_factor") == pytest.approx(after.values, rel=1e-5)
    assert after.values[-1] < after.values[0]


def test_a_second_training_logs_its_own_steps_alone(make_trainer):
    """Three steps, logged every second: the third must not leak into the logs of the next training."""
    trainer = make_trainer(
        make_bert(), make_data("bert", 24), r2_strength=STRENGTH, logging_steps=2, learning_rate=0.05
    )
    trainer.train()
    before = BeforeStep(lambda model: STRENGTH * l_inf_sum(model))
    trainer.add_callback(before)
    trainer.train()
    assert logged(trainer, "r2_loss") == pytest.approx([sum(before.values[:2]) / 2], rel=1e-5)


def test_bfloat16_autocast_leaves_the_range_loss_in_float32(train):
    before = BeforeStep(lambda model: STRENGTH * l_inf_sum(model))
    trainer = train(
        make_bert(), make_data("bert", 16), trainer_kwargs={"callbacks": [before]}, bf16=True, r2_strength=STRENGTH
    )
    assert logged(trainer, "r2_loss") == pytest.approx(before.values, rel=1e-6)


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize("name", ["resnet", "bert", "llama"])
def test_evaluation_loss_is_the_task_loss_alone(train, make_trainer, name, accumulation):
    data = make_data(name, 32)
    ours = train(
        MODELS[name](),
        data,
        trainer_kwargs={"eval_dataset": data},
        eval_strategy="steps",
        eval_steps=1,
        per_device_train_batch_size=4,
        per_device_eval_batch_size=32,
        gradient_accumulation_steps=accumulation,
        r2_strength=2.0,
    )
    plain = make_trainer(ours.model, data, Trainer, per_device_eval_batch_size=32)
    expected = plain.evaluate(data)["eval_loss"]
    during = [entry["eval_loss"] for entry in ours.state.log_history if "eval_loss" in entry]
    assert len(during) == 8 // accumulation
    assert during[-1] == pytest.approx(expected, abs=1e-6)
    assert ours.evaluate()["eval_loss"] == pytest.approx(expected, abs=1e-6)
    assert expected < logged(ours)[-1]
