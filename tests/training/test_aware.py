"""Compression-aware training through the Trainer: when it begins, what it saves, resumes and leaves."""

import json
import logging
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file
from training_cases import assert_same, logged, make_bert, make_data, make_gpt2, make_resnet, snapshot
from transformers import AutoModelForImageClassification, AutoModelForSequenceClassification, TrainerCallback

from hf_r2 import R2QuantizationConfig, R2Trainer
from hf_r2.aware.ewgs import EWGS, EWGSInputs
from hf_r2.quantization import attached

PALETTE = R2QuantizationConfig("palette", bits=2, grain="tensor")
DKM = {"r2_aware": "dkm", "r2_mode": "none", "num_train_epochs": 3}


@pytest.fixture
def make_aware(make_trainer):
    def make(model=None, config=PALETTE, data=None, **arguments):
        data = data or make_data("bert", 24)
        kwargs = {"quantization_config": config, "eval_dataset": data}
        return make_trainer(model or make_bert(), data, R2Trainer, kwargs, **{**DKM, **arguments})

    return make


class Watch(TrainerCallback):
    """Notes at every step whether compression has begun, and at every evaluation the weights that it computed with."""

    def __init__(self):
        self.active, self.evaluated = [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        self.active.append({step.active for _, step in attached(model).values()})

    def on_evaluate(self, args, state, control, model, **kwargs):
        model.eval()
        self.evaluated.append(
            {n: layer.base_layer.weight.detach().clone() for n, (layer, _) in attached(model).items()}
        )


def test_training_ends_with_a_compressed_model_that_computes_what_was_evaluated(make_aware, tmp_path):
    trainer = make_aware(eval_strategy="epoch")
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert trainer.model.hf_quantizer.encoded.keys() == watch.evaluated[-1].keys()
    for name, weight in watch.evaluated[-1].items():
        assert torch.equal(trainer.model.get_parameter(name), weight)
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == last
    trainer.save_model(tmp_path / "compressed")
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "compressed")
    assert_same(snapshot(reloaded), snapshot(trainer.model))


def test_the_saved_checkpoint_says_how_it_was_made(make_aware, tmp_path):
    trainer = make_aware()
    trainer.train()
    trainer.save_model(tmp_path)
    stages = json.loads((tmp_path / "manifest.json").read_text())["stages"]
    train, quantize = (next(s for s in stages if s["stage"] == name) for name in ("train", "quantize"))
    assert train["aware"] == "dkm"
    assert quantize["quantization_config"]["aware"] == "dkm"
    assert quantize["bytes"]["compressed"] < quantize["bytes"]["float"]
    assert {weight["name"] for weight in quantize["weights"]} == trainer.model.hf_quantizer.encoded.keys()


def test_a_compiled_model_trains_to_the_same_weights_and_fuses_passes(make_aware):
    trainers = [make_aware(), make_aware(torch_compile=True, torch_compile_backend="eager")]
    steps = [[step for _, step in attached(trainer.model).values()] for trainer in trainers]
    assert [{step.compiled for step in those} for those in steps] == [{False}, {True}]
    for trainer in trainers:
        trainer.train()
    assert_same(*(snapshot(trainer.model) for trainer in trainers))


@pytest.mark.parametrize(("ratio", "first"), [(0.0, 0), (0.5, 5), (0.31, 4)])
def test_compression_begins_at_its_share_of_the_steps(make_aware, ratio, first):
    trainer = make_aware(max_steps=10, r2_aware_start_ratio=ratio)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert watch.active == [{False}] * first + [{True}] * (10 - first)


def test_until_it_begins_training_is_that_of_the_float_model(make_aware, train):
    aware = make_aware(max_steps=6, r2_aware_start_ratio=0.5)
    aware.train()
    plain = train(make_bert(), make_data("bert", 24), r2_mode="none", max_steps=6)
    assert logged(aware)[:3] == logged(plain)[:3]
    assert logged(aware)[3] != logged(plain)[3]


BINARY = R2QuantizationConfig("least_squares", bits=2)
INPUTS = {"bits": 2, "moving_average": "eval_only"}
BINARY_INPUTS = R2QuantizationConfig("least_squares", bits=1, activations=INPUTS)
UNIFORM = {"bits": 2, "grid": "midrise"}
METHODS = {
    "dkm": PALETTE,
    "least_squares": BINARY,
    "least_squares, activations": BINARY_INPUTS,
    "lsq": R2QuantizationConfig(bits=2, grid="full", activations={"method": "lsq", "bits": 4}),
    "ewgs": R2QuantizationConfig(**UNIFORM, activations={"method": "ewgs", "bits": 4}),
    "ewgs, Hessian": R2QuantizationConfig(
        **UNIFORM,
        aware="ewgs",
        aware_options={"delta": "hessian"},
        include=["classifier.*", "*.pooler.*"],
        activations={"method": "ewgs", "bits": 4},
    ),
    "dorefa": R2QuantizationConfig(**UNIFORM, activations={"method": "dorefa", "bits": 4}),
    "pact": R2QuantizationConfig(**UNIFORM, activations={"method": "pact", "bits": 4}),
    "lsq, uniform activations": R2QuantizationConfig(bits=4, activations={"method": "uniform", "range": "static"}),
}


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_evaluates_saves_and_reloads_one_model(make_aware, method, tmp_path):
    trainer = make_aware(config=METHODS[method], r2_aware=method.split(",")[0], eval_strategy="epoch")
    trainer.train()
    last = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry][-1]
    assert trainer.evaluate()["eval_loss"] == last
    trainer.save_model(tmp_path)
    reloaded = AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert_same(snapshot(reloaded), snapshot(trainer.model))


class Deltas(TrainerCallback):
    """Notes every δ at the start and after every step."""

    def __init__(self):
        self.found = []

    def on_train_begin(self, *args, model, **kwargs):
        self.found.append([float(m.delta) for m in model.modules() if isinstance(m, EWGS | EWGSInputs)])

    on_step_end = on_train_begin


@pytest.mark.parametrize(("ratio", "changes"), [(0.0, [1, 4, 7]), (0.5, [5, 7])])
def test_delta_from_the_hessian_is_found_when_compression_begins_and_with_every_epoch(make_aware, ratio, changes):
    trainer = make_aware(
        config=METHODS["ewgs, Hessian"],
        r2_aware="ewgs",
        r2_aware_start_ratio=ratio,
        per_device_train_batch_size=8,
        max_steps=8,  # of three in an epoch
    )
    deltas = Deltas()
    trainer.add_callback(deltas)
    trainer.train()
    assert sorted(deltas.found[0]) == pytest.approx([0, 0, 1e-3, 1e-3])
    steps = enumerate(pairwise(deltas.found), start=1)
    assert [step for step, (before, after) in steps if before != after] == changes


@pytest.mark.parametrize("method", ["lsq", "ewgs", "pact"])
def test_weight_decay_spares_what_quantizers_learn_but_not_the_clips_of_pact(make_aware, method):
    trainer = make_aware(config=METHODS[method], r2_aware=method, weight_decay=0.1)
    trainer.create_optimizer()
    names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
    decayed, spared = ({names[id(parameter)] for parameter in g["params"]} for g in trainer.optimizer.param_groups)
    learned = {name for name in names.values() if ".weight.0." in name or "input_quantizer" in name}
    clips = {name for name in learned if name.endswith("alpha")}
    assert bool(clips) == (method == "pact")
    assert learned - clips <= spared
    assert clips <= decayed
    assert any(name.endswith("original") for name in decayed)


@pytest.mark.parametrize("ratio", [0.0, 0.75])
@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_the_straight_run_bit_for_bit(make_aware, ratio, method):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "r2_aware_start_ratio": ratio}
    arguments |= {"config": METHODS[method], "r2_aware": method.split(",")[0]}
    straight, resumed = (make_aware(**arguments) for _ in range(2))
    straight.train()
    resumed.train(resume_from_checkpoint=f"{straight.args.output_dir}/checkpoint-4")
    assert_same(snapshot(resumed.model), snapshot(straight.model))


def test_a_checkpoint_in_training_is_a_float_checkpoint(make_aware):
    trainer = make_aware(max_steps=4, save_strategy="steps", save_steps=4)
    trainer.train()
    checkpoint = f"{trainer.args.output_dir}/checkpoint-4"
    model = AutoModelForSequenceClassification.from_pretrained(checkpoint)
    saved = load_file(f"{checkpoint}/model.safetensors")
    weight = model.classifier.weight
    assert torch.equal(weight, saved["classifier.weight"])
    assert len(weight.unique()) > 4
    assert trainer.model.classifier.weight.unique().numel() <= 4


def test_the_best_checkpoint_is_the_one_that_is_compressed(make_aware):
    arguments = {"eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 3, "save_steps": 3, "max_steps": 9}
    trainer = make_aware(load_best_model_at_end=True, learning_rate=0.3, **arguments)
    trainer.train()
    losses = [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]
    assert trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), abs=0)


def test_range_restriction_acts_on_the_latent_weights(make_aware):
    trainer = make_aware(r2_mode="clip", r2_clip=1.3, max_steps=5)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert logged(trainer, "crest_factor")[-1] < 1.45


@pytest.mark.parametrize("loss", ["l_inf", "margin", "soft_min_max"])
def test_range_losses_train_along(make_aware, loss):
    trainer = make_aware(r2_mode="loss", r2_loss=loss, r2_strength=0.05)
    trainer.train()
    assert logged(trainer, "r2_loss")[-1] < logged(trainer, "r2_loss")[0]


@pytest.mark.parametrize(
    "arguments", [{"bf16": True}, {"gradient_checkpointing": True}, {"optim": "adamw_torch"}], ids=str
)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_it_works_with(make_aware, arguments):
    trainer = make_aware(**arguments)
    trainer.train()
    assert all(torch.isfinite(tensor).all() for tensor in snapshot(trainer.model).values())


def test_gradient_checkpointing_changes_nothing(make_aware):
    plain, checkpointed = make_aware(), make_aware(gradient_checkpointing=True)
    for trainer in (plain, checkpointed):
        trainer.train()
    assert_same(snapshot(checkpointed.model), snapshot(plain.model))


def test_convolutions_and_conv1d_train(make_aware, tmp_path):
    for model, data in ((make_resnet(), make_data("resnet", 24)), (make_gpt2(), make_data("gpt2", 24))):
        trainer = make_aware(model, data=data)
        trainer.train()
        trainer.save_model(tmp_path)
    trainer = make_aware(make_resnet(), data=make_data("resnet", 24))
    trainer.train()
    trainer.save_model(tmp_path / "resnet")
    assert_same(snapshot(AutoModelForImageClassification.from_pretrained(tmp_path / "resnet")), snapshot(trainer.model))


def test_without_a_method_the_model_is_compressed_after_training(make_aware, train):
    trainer = make_aware(r2_aware=None)
    trainer.train()
    plain = train(make_bert(), make_data("bert", 24), r2_mode="none", num_train_epochs=3)
    assert logged(trainer) == logged(plain)
    assert trainer.model.hf_quantizer.quantization_config.aware is None


def test_a_temperature_that_is_too_high_is_warned_of_once_per_weight(make_aware, caplog):
    config = R2QuantizationConfig(
        "palette", bits=2, aware="dkm", aware_options={"temperature": 2.0}, include=["*query*"]
    )
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    trainer = make_aware(config=config, r2_aware=None)
    trainer.train()
    logger.removeHandler(caplog.handler)
    messages = [record.getMessage() for record in caplog.records if "above the weight" in record.getMessage()]
    assert len(messages) == len(attached_names(trainer))


def attached_names(trainer):
    return trainer.model.hf_quantizer.encoded.keys()


def test_mistakes_are_refused(make_trainer, make_aware):
    with pytest.raises(ValueError, match="r2_aware='dkm' needs a quantization_config"):
        make_trainer(make_bert(), make_data("bert", 8), r2_aware="dkm")
    with pytest.raises(ValueError, match="r2_aware='dmk' is not one of dkm, least_squares"):
        make_aware(r2_aware="dmk")
    with pytest.raises(ValueError, match=r"r2_aware_start_ratio=1.0 is not in \[0, 1\)"):
        make_aware(r2_aware_start_ratio=1.0)
    with pytest.raises(ValueError, match="trains the codec 'palette'"):
        make_aware(config=R2QuantizationConfig("uniform", bits=2))
    with pytest.raises(ValueError, match="'lsq' are learned in training: set aware"):
        make_aware(config=METHODS["lsq"], r2_aware=None)
    trainer = make_aware(max_steps=1)
    trainer.train()
    with pytest.raises(ValueError, match="the model is compressed and cannot train"):
        trainer.train()
