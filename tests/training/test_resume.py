import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from training_cases import (
    MODELS,
    assert_same,
    make_bert,
    make_data,
    make_resnet,
    snapshot,
    train_logs,
)
from transformers import (
    BertForSequenceClassification,
    ResNetForImageClassification,
    TrainerCallback,
)

from hf_r2.report.manifest import Manifest

TIMELESS = ("loss", "task_loss", "r2_loss", "crest_factor", "grad_norm", "learning_rate", "epoch", "step")


class StopAfter(TrainerCallback):
    """Stops the training, as an interruption would, without changing its schedule."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def settings(loss, accumulation=1):
    return {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "optim": "adamw_torch",
        "learning_rate": 0.01,
        "lr_scheduler_type": "linear",
        "weight_decay": 0.1,
        "max_grad_norm": 1.0,
        "gradient_accumulation_steps": accumulation,
        "r2_loss": loss,
        "r2_strength": 0.3,
        "r2_learning_rate": 0.1,
    }


def timeless_logs(trainer):
    return [{key: entry[key] for key in TIMELESS} for entry in train_logs(trainer)]


@pytest.mark.parametrize("loss", ["l_inf", "margin", "soft_min_max"])
@pytest.mark.parametrize(
    ("name", "examples", "accumulation"),
    [("resnet", 64, 1), ("resnet", 16, 1), ("dropout_bert", 32, 1), ("dropout_bert", 40, 2), ("llama", 32, 2)],
    ids=str,
)
def test_resumed_training_is_the_straight_one_bit_for_bit(train, make_trainer, name, examples, accumulation, loss):
    """The examples put the checkpoint inside an epoch, at its end, or after an uneven window."""
    data, options = make_data(name, examples), settings(loss, accumulation)
    straight = train(MODELS[name](), data, **options)
    stopped = train(MODELS[name](), data, trainer_kwargs={"callbacks": [StopAfter(3)]}, **options)
    assert stopped.state.global_step == 3

    resumed = make_trainer(MODELS[name](), data, **options)
    resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-3")

    assert resumed.state.global_step == 6
    assert_same(snapshot(resumed.model), snapshot(straight.model))
    assert_same(snapshot(resumed.range_loss), snapshot(straight.range_loss))
    assert timeless_logs(resumed)[3:] == timeless_logs(straight)[3:]


def test_resuming_takes_the_saved_learnable_values(train, make_trainer):
    options = settings("margin")
    stopped = train(make_bert(), make_data("bert", 32), trainer_kwargs={"callbacks": [StopAfter(3)]}, **options)
    saved = load_file(f"{stopped.args.output_dir}/checkpoint-3/r2_state.safetensors")
    assert_same(saved, snapshot(stopped.range_loss))
    resumed = make_trainer(make_bert(), make_data("bert", 32), **{**options, "max_steps": 3})
    resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-3")
    assert_same(snapshot(resumed.range_loss), saved)


@pytest.mark.parametrize("loss", ["margin", "soft_min_max"])
def test_checkpoint_without_r2_state_is_refused(train, make_trainer, loss):
    data = make_data("bert", 32)
    stopped = train(make_bert(), data, trainer_kwargs={"callbacks": [StopAfter(3)]}, **settings("l_inf"))
    resumed = make_trainer(make_bert(), data, **settings(loss))
    with pytest.raises(ValueError, match=rf"checkpoint-3 does not hold the R2 state of r2_loss='{loss}'"):
        resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-3")


def test_r2_state_of_another_grain_is_refused(train, make_trainer):
    data, options = make_data("bert", 32), settings("margin")
    stopped = train(make_bert(), data, trainer_kwargs={"callbacks": [StopAfter(3)]}, **options)
    resumed = make_trainer(make_bert(), data, **options, r2_grain="channel")
    with pytest.raises(ValueError, match="resume with the r2_\\* arguments"):
        resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-3")


@pytest.mark.parametrize("loss", ["l_inf", "margin"])
@pytest.mark.parametrize(
    ("name", "cls"), [("resnet", ResNetForImageClassification), ("bert", BertForSequenceClassification)]
)
def test_saved_model_reloads_without_unexpected_keys(train, tmp_path, name, cls, loss):
    trainer = train(MODELS[name](), make_data(name, 16), r2_loss=loss, r2_strength=0.1)
    trainer.save_model(tmp_path / "saved")
    model, info = cls.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["unexpected_keys"]
    assert not info["missing_keys"]
    assert_same(snapshot(model), snapshot(trainer.model))


def test_saved_model_has_a_manifest_of_the_training(train, tmp_path):
    options = {"r2_loss": "tail", "r2_strength": 0.25, "r2_tail_fraction": 0.1, "r2_exclude": ["classifier*"]}
    trainer = train(make_bert(), make_data("bert", 16), seed=7, **options)
    trainer.save_model(tmp_path / "saved")
    stage = Manifest.load(tmp_path / "saved").last("train")
    fields = {name: getattr(trainer.args, name) for name in vars(trainer.args) if name.startswith("r2_")}
    assert stage["r2"] == fields
    assert stage["r2"].items() >= options.items()
    assert stage["seed"] == 7
    assert stage["steps"] == 2
    assert stage["seconds"] > 0
    curve = [entry for entry in stage["log_history"] if "r2_loss" in entry]
    assert [entry["task_loss"] for entry in curve] == [entry["task_loss"] for entry in train_logs(trainer)]


def test_manifest_of_a_baseline_says_that_nothing_was_regularized(train, tmp_path):
    trainer = train(make_bert(), make_data("bert", 16), r2_strength=0.0)
    trainer.save_model(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "manifest.json").read_text())["stages"][0]["r2"] is None


def test_checkpoints_hold_no_manifest_and_no_r2_state_without_learnable_values(train):
    trainer = train(make_resnet(), make_data("resnet", 64), **settings("l_inf"))
    files = {path.name for path in (Path(trainer.args.output_dir) / "checkpoint-3").iterdir()}
    assert "model.safetensors" in files
    assert files.isdisjoint({"manifest.json", "r2_state.safetensors"})


def test_save_model_without_a_directory_writes_to_the_output_directory(train):
    trainer = train(make_bert(), make_data("bert", 16), r2_strength=0.1)
    trainer.save_model()
    assert Manifest.load(trainer.args.output_dir).last("train")["steps"] == 2
    assert torch.equal(
        load_file(Path(trainer.args.output_dir) / "model.safetensors")["classifier.weight"],
        trainer.model.state_dict()["classifier.weight"],
    )
