"""The decoupled modes of the trainer, and the schedule of the strength."""

from copy import deepcopy

import pytest
import torch
from training_cases import make_bert, make_data, make_resnet

from hf_r2 import R2TrainingArguments
from hf_r2.projection import clip_to_rms, prox_l_inf
from hf_r2.selection import output_first, select_weights

SGD = {"optim": "sgd", "learning_rate": 0.05, "max_steps": 1, "logging_steps": 1}


def selected(model):
    return {name: output_first(*owner_weight(owner)).detach() for name, owner in select_weights(model).items()}


def owner_weight(owner):
    module, attribute = owner
    return module, getattr(module, attribute)


@pytest.mark.parametrize("optim", ["sgd", "adamw_torch"])
@pytest.mark.parametrize("mode", ["clip", "prox"])
def test_one_step_is_the_plain_step_and_then_the_projection(train, mode, optim):
    start, data = make_bert(), make_data("bert", 8)
    options = {**SGD, "optim": optim}
    plain = train(deepcopy(start), data, r2_mode="none", **options)
    restricted = train(deepcopy(start), data, r2_mode=mode, r2_strength=3.0, r2_clip=1.3, **options)
    for name, weight in selected(plain.model).items():
        expected = clip_to_rms(weight, 1.3) if mode == "clip" else prox_l_inf(weight, 0.05 * 3.0)
        torch.testing.assert_close(selected(restricted.model)[name], expected, rtol=1e-6, atol=1e-8)
    for name, parameter in plain.model.named_parameters():
        if name not in selected(plain.model):
            assert torch.equal(parameter, restricted.model.get_parameter(name)), name


@pytest.mark.parametrize(
    "options", [{"r2_mode": "clip", "r2_clip": float("inf")}, {"r2_mode": "prox", "r2_strength": 0.0}]
)
def test_no_restriction_is_plain_training_bit_for_bit(train, options):
    start, data = make_resnet(), make_data("resnet", 32)
    steps = {**SGD, "max_steps": 4}
    plain = train(deepcopy(start), data, r2_mode="none", **steps)
    restricted = train(deepcopy(start), data, **options, **steps)
    for name, tensor in plain.model.state_dict().items():
        assert torch.equal(tensor, restricted.model.state_dict()[name]), name


def test_accumulation_projects_once_per_optimizer_step(make_trainer, monkeypatch):
    trainer = make_trainer(
        make_bert(), make_data("bert", 16), r2_mode="clip", **{**SGD, "max_steps": 2},
        per_device_train_batch_size=2, gradient_accumulation_steps=4,
    )  # fmt: skip
    calls = []
    monkeypatch.setattr("hf_r2.projection.RangeProjection.step", lambda self, share: calls.append(share))
    trainer.train()
    assert calls == [1.0, 1.0]


def test_crest_factor_is_logged_and_falls_to_the_clip(train):
    data = make_data("bert", 64)
    trainer = train(make_bert(), data, r2_mode="clip", r2_clip=1.2, **{**SGD, "max_steps": 5})
    crests = [entry["crest_factor"] for entry in trainer.state.log_history if "crest_factor" in entry]
    assert len(crests) == 5
    assert crests[-1] < 1.35  # clipping lowers the rms as well, so the ratio ends a little above the limit


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1, 1, 1, 1]),
        ({"r2_warmup_ratio": 0.5}, [0, 0.5, 1, 1]),
        ({"r2_start_ratio": 0.25, "r2_warmup_ratio": 0.5}, [0, 0, 0.5, 1]),
        ({"r2_start_ratio": 0.25, "r2_end_ratio": 0.75}, [0, 1, 1, 0]),
    ],
)
def test_share_of_the_strength_over_the_training(tmp_path, options, expected):
    arguments = R2TrainingArguments(str(tmp_path), **options)
    assert [arguments.r2_share(progress) for progress in (0, 0.25, 0.5, 0.75)] == expected


def test_loss_strength_follows_the_schedule(train):
    data = make_data("bert", 64)
    options = {**SGD, "max_steps": 4, "learning_rate": 0.0}
    constant = train(make_bert(), data, r2_strength=1.0, **options)
    ramped = train(make_bert(), data, r2_strength=1.0, r2_warmup_ratio=0.5, **options)
    terms = [
        [entry["r2_loss"] for entry in trainer.state.log_history if "r2_loss" in entry]
        for trainer in (constant, ramped)
    ]
    assert terms[1] == pytest.approx([share * term for share, term in zip([0, 0.5, 1, 1], terms[0], strict=True)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r2_clip": 1.0}, "r2_clip"),
        ({"r2_warmup_ratio": 1.5}, "r2_warmup_ratio"),
        ({"r2_start_ratio": 0.5, "r2_end_ratio": 0.5}, "r2_start_ratio"),
    ],
)
def test_bad_schedule_names_its_field(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        R2TrainingArguments(str(tmp_path), **options)
