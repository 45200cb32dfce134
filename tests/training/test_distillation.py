"""Distillation: its maths, what it adds to a training, what it leaves alone, and what it refuses."""

import json
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.functional import cross_entropy
from training_cases import (
    MODELS,
    assert_close,
    assert_same,
    logged,
    make_bert,
    make_data,
    make_dropout_bert,
    make_fixed_norm_resnet,
    make_gpt2,
    make_resnet,
    snapshot,
    train_logs,
)
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertForTokenClassification,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainerCallback,
)

from hf_r2 import R2Mixin, R2QuantizationConfig, R2Trainer
from hf_r2.training.distillation import distillation_loss
from hf_r2.training.teacher import _tensors, fingerprint, place

PLAIN = {"r2_mode": "none"}
START = {**PLAIN, "r2_teacher": "start"}
PALETTE = {"trainer_kwargs": {"quantization_config": R2QuantizationConfig("palette", bits=2, grain="tensor")}}


def make_teacher(name):
    """The same architecture with other weights, and outputs that are far from uniform."""
    teacher = MODELS[name]()
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return teacher


def divergence(student, teacher, temperature):
    """KL in float64, from the definition: nothing in common with the code but softmax."""
    p, q = ((logits.double() / temperature).softmax(-1) for logits in (teacher, student))
    return (p * (p / q).log()).sum(-1)


# --- maths ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [0.0, 300.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_loss_is_the_divergence_times_the_squared_temperature(temperature, offset):
    student, teacher = 3 * torch.randn(2, 5, 7), 3 * torch.randn(2, 5, 7) + offset
    expected = temperature**2 * divergence(student, teacher, temperature)
    torch.testing.assert_close(
        distillation_loss(student, teacher, temperature).double(), expected, rtol=1e-5, atol=1e-4 if offset else 1e-5
    )


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_gradient(temperature):
    student, teacher = (torch.randn(3, 4, dtype=torch.float64) for _ in range(2))
    student.requires_grad_()
    assert torch.autograd.gradcheck(lambda logits: distillation_loss(logits, teacher, temperature), student)
    (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature).sum(), student)
    p, q = ((logits / temperature).softmax(-1) for logits in (teacher, student))
    torch.testing.assert_close(gradient, temperature * (q - p))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_student_that_is_its_teacher_has_no_loss_and_no_gradient_at_all(dtype):
    student = (10 * torch.randn(64, 1000)).to(dtype).requires_grad_()
    loss = distillation_loss(student, student.detach(), 3.0)
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert not loss.any()
    assert not student.grad.any()


def test_gradients_of_a_higher_temperature_keep_their_size():
    student, teacher = torch.randn(8, 5).requires_grad_(), torch.randn(8, 5)
    sizes = []
    for temperature in (20.0, 80.0):
        (gradient,) = torch.autograd.grad(distillation_loss(student, teacher, temperature).sum(), student)
        sizes.append(gradient.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.1)


# --- in a training --------------------------------------------------------------------------------------------------


def first_losses(name, data, student, teacher, temperature):
    """Task and distillation loss of the first batch of all the data, over the items that count."""
    keys = [key for key in data[0] if key != "labels"]
    inputs = {key: torch.stack([example[key] for example in data]) for key in keys}
    labels = torch.stack([torch.as_tensor(example["labels"]) for example in data])
    with torch.no_grad():
        ours, theirs = (model.train(model is student)(**inputs).logits for model in (student, teacher.eval()))
    if labels.ndim == 2:
        ours, theirs, labels = ours[:, :-1], theirs[:, :-1], labels[:, 1:]
    counted = labels != -100
    task = cross_entropy(ours[counted], labels[counted])
    return task.item(), temperature**2 * divergence(ours[counted], theirs[counted], temperature).mean().item()


def masked(data):
    """Ignores the labels of some tokens, more of them in some sequences."""
    for index, example in enumerate(data):
        if isinstance(example["labels"], torch.Tensor):
            example["labels"] = example["labels"].clone()
            example["labels"][: index % 7] = -100
    return data


@pytest.mark.parametrize(("share", "temperature"), [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("name", ["bert", "resnet", "llama"])
def test_losses_are_the_reference_s_and_add_up(train, name, share, temperature):
    data, teacher = masked(make_data(name, 8)), make_teacher(name)
    task, distillation = first_losses(name, data, MODELS[name](), teacher, temperature)
    settings = {"r2_distillation_share": share, "r2_distillation_temperature": temperature, "r2_strength": 0.1}
    trainer = train(MODELS[name](), data, trainer_kwargs={"teacher": teacher}, **settings)
    (logs,) = train_logs(trainer)
    assert logs["task_loss"] == pytest.approx(task, rel=1e-4)
    assert logs["distillation_loss"] == pytest.approx(distillation, rel=1e-4)
    assert distillation > 1e-3
    expected = (1 - share) * task + share * distillation + logs["r2_loss"]
    assert logs["loss"] == pytest.approx(expected, rel=1e-4)


def test_logs_are_averages_over_the_steps_between(train):
    options = {"trainer_kwargs": {"teacher": make_teacher("bert")}, "gradient_accumulation_steps": 2, **PLAIN}
    each, pairs = (train(make_bert(), make_data("bert", 64), logging_steps=steps, **options) for steps in (1, 2))
    for key in ("task_loss", "distillation_loss"):
        values = logged(each, key)
        assert logged(pairs, key) == pytest.approx([sum(values[:2]) / 2, sum(values[2:]) / 2], rel=1e-5)


def test_share_one_follows_the_teacher_and_no_labels(train):
    data, teacher = make_data("bert", 32), make_teacher("bert")
    relabelled = [{**example, "labels": (example["labels"] + 1) % 3} for example in data]
    first, second = (
        train(make_bert(), some, trainer_kwargs={"teacher": teacher}, num_train_epochs=5, **PLAIN)
        for some in (data, relabelled)
    )
    assert_same(snapshot(first.model), snapshot(second.model))
    assert logged(first, "distillation_loss")[-1] < 0.5 * logged(first, "distillation_loss")[0]
    assert logged(first, "task_loss") != logged(second, "task_loss")


@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet", "gpt2", "llama"])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_the_start_as_teacher_moves_nothing(train, name, optimizer):
    """Not even by rounding errors, which Adam would scale to whole steps."""
    start = snapshot(MODELS[name]())
    trainer = train(MODELS[name](), make_data(name, 16), optim=optimizer, **START)
    assert logged(trainer, "distillation_loss") == logged(trainer, "loss") == logged(trainer, "grad_norm") == [0.0, 0.0]
    assert_same(snapshot(trainer.model), start)


@pytest.mark.parametrize("teacher", ["start", "given"])
def test_the_teacher_stays_as_it_is_and_out_of_the_checkpoint(train, teacher):
    given = make_resnet()
    options = {"r2_teacher": "start"} if teacher == "start" else {"trainer_kwargs": {"teacher": given}}
    before = snapshot(make_resnet())
    settings = {"save_strategy": "steps", "save_steps": 2, "num_train_epochs": 2, "r2_distillation_share": 0.5}
    trainer = train(make_resnet(), make_data("resnet", 16), **options, **settings)
    assert_same(snapshot(trainer.teacher), before)
    assert not trainer.teacher.training
    assert all(parameter.grad is None for parameter in trainer.teacher.parameters())
    saved = load_file(Path(trainer.args.output_dir) / "checkpoint-4" / "model.safetensors")
    assert saved.keys() == before.keys()
    assert not torch.equal(saved["classifier.1.weight"], before["classifier.1.weight"])


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["bert", "fixed_norm_resnet", "llama", "gpt2"])
def test_trajectory_does_not_depend_on_accumulation(train, name, smoothing):
    """Windows of 32, 32 and 16 examples, the last of them half as many micro-batches."""
    data, teacher = masked(make_data(name, 80)), make_teacher(name)
    options = {"r2_strength": 0.05, "r2_distillation_share": 0.7, "label_smoothing_factor": smoothing}
    options |= {"trainer_kwargs": {"teacher": teacher}, "num_train_epochs": 2}
    whole = train(MODELS[name](), data, per_device_train_batch_size=32, **options)
    cut = train(MODELS[name](), data, per_device_train_batch_size=8, gradient_accumulation_steps=4, **options)
    assert_close(snapshot(cut.model), snapshot(whole.model))
    for key in ("loss", "task_loss", "distillation_loss"):
        assert logged(cut, key) == pytest.approx(logged(whole, key), abs=1e-5)


def test_an_own_loss_function_is_the_task_loss(train):
    def loss_function(outputs, labels, num_items_in_batch=None):
        return 2 * cross_entropy(outputs["logits"], labels, reduction="sum") / num_items_in_batch

    data, teacher = make_data("bert", 32), make_teacher("bert")
    kwargs = {"teacher": teacher, "compute_loss_func": loss_function}
    options = {"r2_distillation_share": 0.5, **PLAIN}
    whole = train(make_bert(), data, trainer_kwargs=kwargs, per_device_train_batch_size=32, **options)
    cut = train(make_bert(), data, trainer_kwargs=kwargs, gradient_accumulation_steps=4, **options)
    task, distillation = first_losses("bert", data, make_bert(), teacher, 1.0)
    for trainer in (whole, cut):
        assert logged(trainer, "task_loss") == pytest.approx([2 * task], rel=1e-5)
        assert logged(trainer, "distillation_loss") == pytest.approx([distillation], rel=1e-5)
    assert_close(snapshot(cut.model), snapshot(whole.model))


class ShareTrainer(Trainer):
    """A trainer whose loss is divided by the accumulation steps already, and which says so."""

    loss_is_scaled_for_ga = True

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if model.training:
            loss = loss / self.current_gradient_accumulation_steps
        return (loss, outputs) if return_outputs else loss


class R2ShareTrainer(R2Mixin, ShareTrainer):
    """The same with distillation."""


def test_it_weighs_as_a_loss_that_is_divided_already(train):
    data, kwargs = make_data("bert", 64), {"teacher": make_teacher("bert")}
    trainers = []
    for trainer_class, settings in (
        (R2Trainer, {"per_device_train_batch_size": 32}),
        (R2ShareTrainer, {"gradient_accumulation_steps": 4}),
    ):
        model = make_bert()
        model.accepts_loss_kwargs = False  # so that no items are counted
        options = {"r2_distillation_share": 0.5, **PLAIN, **settings}
        trainers.append(train(model, data, trainer_class, kwargs, **options))
    whole, cut = trainers
    assert_close(snapshot(cut.model), snapshot(whole.model))
    for key in ("loss", "task_loss", "distillation_loss"):
        assert logged(cut, key) == pytest.approx(logged(whole, key), abs=1e-5)


def test_token_classification_counts_the_labelled_tokens_unshifted(train):
    config = BertConfig(vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=3)
    torch.manual_seed(0)
    student, teacher = BertForTokenClassification(config).eval(), BertForTokenClassification(config).eval()
    student.config.hidden_dropout_prob = 0
    data = make_data("gpt2", 8)
    for index, example in enumerate(data):
        example["labels"] = example["labels"] % 3
        example["labels"][index % 8 :] = -100
    inputs, labels = (torch.stack([example[key] for example in data]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        values = divergence(student(inputs).logits, teacher(inputs).logits, 1.0)
    for module in student.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    trainer = train(student, data, trainer_kwargs={"teacher": teacher}, learning_rate=0.0, **PLAIN)
    assert logged(trainer, "distillation_loss") == pytest.approx([values[labels != -100].mean().item()], rel=1e-4)


def test_an_encoder_decoder_is_taught_where_its_labels_are(train):
    config = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2}
    torch.manual_seed(0)
    student, teacher = (
        T5ForConditionalGeneration(T5Config(**config, dropout_rate=0.0, decoder_start_token_id=0)) for _ in range(2)
    )
    data = make_data("gpt2", 8)
    inputs, labels = (torch.stack([example[key] for example in data]) for key in ("input_ids", "labels"))
    with torch.no_grad():
        student_logits, teacher_logits = (model.eval()(inputs, labels=labels).logits for model in (student, teacher))
    expected = divergence(student_logits, teacher_logits, 1.0).mean().item()
    trainer = train(student, data, trainer_kwargs={"teacher": teacher}, **PLAIN)
    assert logged(trainer, "distillation_loss") == pytest.approx([expected], rel=1e-4)


def test_evaluation_is_the_task_s_alone(train):
    data, teacher = make_data("bert", 16), make_teacher("bert")
    trainer = train(make_bert(), data, trainer_kwargs={"teacher": teacher, "eval_dataset": data}, **PLAIN)
    inputs, labels = torch.stack([x["input_ids"] for x in data]), torch.tensor([x["labels"] for x in data])
    with torch.no_grad():
        task = cross_entropy(trainer.model.eval()(inputs).logits, labels)
    assert trainer.evaluate()["eval_loss"] == pytest.approx(task.item(), rel=1e-5)


def test_one_forward_of_each_model_per_micro_batch(make_trainer):
    student, teacher = make_bert(), make_teacher("bert")
    calls = []
    for model, name in ((student, "student"), (teacher, "teacher")):
        model.register_forward_hook(lambda *_, name=name: calls.append(name))
    trainer = make_trainer(student, make_data("bert", 32), trainer_kwargs={"teacher": teacher}, **PLAIN)
    trainer.train()
    assert calls == ["student", "teacher"] * 4


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}], ids=str)
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated")
def test_it_works_with(train, options):
    data, teacher = make_data("bert", 16), make_teacher("bert")
    plain, other = (train(make_bert(), data, trainer_kwargs={"teacher": teacher}, **PLAIN, **o) for o in ({}, options))
    assert logged(other, "distillation_loss") == pytest.approx(logged(plain, "distillation_loss"), rel=0.05)
    assert_close(snapshot(other.model), snapshot(plain.model), atol=0.01 if "bf16" in options else 1e-7)


def test_a_teacher_keeps_its_own_dtype(train):
    teacher = make_fixed_norm_resnet().to(torch.bfloat16)
    trainer = train(make_fixed_norm_resnet(), make_data("resnet", 16), trainer_kwargs={"teacher": teacher}, **PLAIN)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}
    assert 0 < logged(trainer, "distillation_loss")[0] < 0.01


# --- where teachers come from ---------------------------------------------------------------------------------------


@pytest.fixture
def teacher_path(tmp_path):
    """A saved teacher for `make_bert`, of another width."""
    config = {**make_bert().config.to_dict(), "hidden_size": 24}
    torch.manual_seed(7)
    BertForSequenceClassification(BertConfig(**config)).save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_a_checkpoint_teaches(train, teacher_path):
    trainer = train(make_bert(), make_data("bert", 16), r2_teacher=str(teacher_path), **PLAIN)
    assert trainer.teacher.config.hidden_size == 24
    expected = load_file(teacher_path / "model.safetensors")
    assert_same(snapshot(trainer.teacher), expected)
    assert logged(trainer, "distillation_loss")[0] > 0


def test_a_checkpoint_of_another_architecture_is_loaded_with_the_auto_class(make_trainer, tmp_path):
    from transformers import (
        DistilBertConfig,
        DistilBertForSequenceClassification,
        MobileNetV2Config,
        MobileNetV2ForImageClassification,
    )

    distilbert = DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=1, n_heads=2, num_labels=3)
    for student, teacher, data in (
        (make_bert(), DistilBertForSequenceClassification(distilbert), "bert"),
        (make_resnet(), MobileNetV2ForImageClassification(MobileNetV2Config(num_labels=3)), "resnet"),
    ):
        teacher.save_pretrained(tmp_path / data)
        trainer = make_trainer(student, make_data(data, 8), r2_teacher=str(tmp_path / data), **PLAIN)
        assert type(trainer.teacher) is type(teacher)
        trainer.train()


def test_the_start_is_taken_before_compression_begins(train):
    start = snapshot(make_teacher("bert"))
    options = {"r2_aware": "dkm", "num_train_epochs": 4, "r2_aware_start_ratio": 0.25}
    trainer = train(make_teacher("bert"), make_data("bert", 32), **PALETTE, **START, **options)
    assert_same(snapshot(trainer.teacher), start)
    losses = logged(trainer, "distillation_loss")
    assert losses[:4] == [0.0] * 4
    assert 0 < losses[-1] < losses[4]
    assert trainer.model.hf_quantizer.encoded


def test_with_model_init_the_start_is_the_model_that_is_trained(make_trainer):
    number = iter(range(10))

    def model_init():
        model = make_bert()
        model.classifier.bias.data.fill_(float(next(number)))
        return model

    trainer = make_trainer(None, make_data("bert", 8), trainer_kwargs={"model_init": model_init}, **START)
    for expected in (1.0, 2.0):
        trainer.train()
        assert (trainer.teacher.classifier.bias == expected).all()
        assert logged(trainer, "distillation_loss")[0] == 0


class StopAfter(TrainerCallback):
    """Stops the training, as an interruption would, without changing its schedule."""

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= 3


RESUMABLE = {
    "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "r2_teacher": "start", "r2_distillation_share": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("aware", [{}, {"r2_aware": "dkm", "r2_mode": "clip"}], ids=["float", "dkm"])
def test_resumed_training_is_the_straight_one_bit_for_bit(train, make_trainer, aware):
    data, kwargs = make_data("bert", 32), PALETTE["trainer_kwargs"] if aware else {}
    options = {**RESUMABLE, **aware}
    straight = train(make_dropout_bert(), data, trainer_kwargs=kwargs, **options)
    stopped = train(make_dropout_bert(), data, trainer_kwargs={**kwargs, "callbacks": [StopAfter()]}, **options)
    resumed = make_trainer(make_dropout_bert(), data, trainer_kwargs=kwargs, **options)
    resumed.train(resume_from_checkpoint=f"{stopped.args.output_dir}/checkpoint-3")
    assert_same(snapshot(resumed.model), snapshot(straight.model))
    assert_same(snapshot(resumed.teacher), snapshot(make_dropout_bert()))
    assert logged(resumed, "distillation_loss") == logged(straight, "distillation_loss")


def test_resuming_with_another_teacher_is_refused(train, make_trainer):
    data = make_data("bert", 32)
    stopped = train(make_bert(), data, trainer_kwargs={"callbacks": [StopAfter()]}, **RESUMABLE)
    checkpoint = f"{stopped.args.output_dir}/checkpoint-3"
    wrong_start = make_trainer(BertForSequenceClassification.from_pretrained(checkpoint), data, **RESUMABLE)
    other = {**RESUMABLE, "r2_teacher": None}
    wrong_teacher = make_trainer(make_bert(), data, trainer_kwargs={"teacher": make_teacher("bert")}, **other)
    for trainer in (wrong_start, wrong_teacher):
        with pytest.raises(
            ValueError, match=r"checkpoint-3 has another teacher: resume with the same one; .* build the"
        ):
            trainer.train(resume_from_checkpoint=checkpoint)
    undistilled = train(make_bert(), data, trainer_kwargs={"callbacks": [StopAfter()]}, **other)
    with pytest.raises(ValueError, match="does not hold the R2 state"):
        make_trainer(make_bert(), data, **RESUMABLE).train(
            resume_from_checkpoint=f"{undistilled.args.output_dir}/checkpoint-3"
        )


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_a_process_without_weights_makes_room_for_those_of_the_first(monkeypatch):
    sent = [tensor.clone() for tensor in _tensors(make_gpt2())]
    received = iter(sent)
    monkeypatch.setattr("hf_r2.training.teacher.broadcast", lambda tensor: next(received))
    empty = make_gpt2().to("meta")
    place(empty, torch.device("cpu"), processes=2)
    assert_same(snapshot(empty), snapshot(make_gpt2()))
    assert torch.equal(fingerprint(empty), fingerprint(make_gpt2()))


def test_fingerprints_tell_teachers_apart():
    teachers = [make_bert(), make_bert(), make_gpt2(), make_bert().to(torch.bfloat16)]
    with torch.no_grad():
        teachers[1].classifier.bias[0] += 1e-6
    prints = {bytes(fingerprint(teacher).tolist()) for teacher in teachers}
    assert len(prints) == 4
    assert torch.equal(fingerprint(make_bert()), fingerprint(deepcopy(make_bert())))


@pytest.mark.parametrize("source", ["path", "start", "given", None])
def test_the_manifest_names_the_teacher_without_a_path(train, tmp_path, teacher_path, source):
    options = {"r2_teacher": {"path": str(teacher_path), "start": "start"}.get(source)}
    if source == "given":
        options["trainer_kwargs"] = {"teacher": make_teacher("bert")}
    trainer = train(make_bert(), make_data("bert", 8), r2_strength=0.1, r2_distillation_temperature=2.0, **options)
    trainer.save_model(tmp_path / "saved")
    text = (tmp_path / "saved" / "manifest.json").read_text()
    (stage,) = json.loads(text)["stages"]
    name = {"path": "teacher", "start": "start", "given": "BertForSequenceClassification"}.get(source)
    assert stage["distillation"] == (name and {"teacher": name, "temperature": 2.0, "share": 1.0})
    assert str(tmp_path) not in text


# --- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r2_distillation_temperature": 0.0}, "r2_distillation_temperature=0.0 is not a number > 0"),
        ({"r2_distillation_temperature": float("nan")}, "r2_distillation_temperature=nan is not a number > 0"),
        ({"r2_distillation_share": 0.0}, r"r2_distillation_share=0.0 is not in \(0, 1\]: .* leave out r2_teacher"),
        ({"r2_distillation_share": 1.5}, r"r2_distillation_share=1.5 is not in \(0, 1\]"),
    ],
)
def test_arguments_out_of_range_are_refused(make_trainer, options, message):
    with pytest.raises(ValueError, match=message):
        make_trainer(make_bert(), [], **START, **options)


def test_unsuitable_teachers_are_refused_when_the_trainer_is_built(make_trainer, tmp_path):
    student = make_bert()
    student.bert.save_pretrained(tmp_path / "headless")
    for kwargs, name, message in (
        ({"teacher": make_bert()}, "start", "two teachers, teacher= and r2_teacher='start': give one"),
        ({"teacher": student}, None, "shares parameters with the model .* give r2_teacher='start'"),
        (
            {},
            str(tmp_path / "headless"),
            r"lacks .*classifier.weight.*: name a checkpoint that was trained for the task",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            make_trainer(student, [], trainer_kwargs=kwargs, r2_teacher=name)


def test_a_model_that_is_none_of_transformers_needs_a_teacher_in_hand(make_trainer, teacher_path):
    with pytest.raises(ValueError, match="not for Classifier: load it yourself and pass teacher="):
        make_trainer(Classifier(), [], r2_teacher=str(teacher_path))


def test_a_model_with_compression_attached_cannot_be_copied(make_trainer):
    from hf_r2 import attach

    model = attach(make_bert(), R2QuantizationConfig("palette", bits=2, grain="tensor", aware="dkm"))
    with pytest.raises(ValueError, match="compression is attached to it: leave that to the trainer"):
        make_trainer(model, [], **START)


class Classifier(nn.Module):
    """A model that is none of transformers."""

    def __init__(self, classes=3):
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(8, classes)

    def forward(self, input_ids, labels=None):
        logits = self.linear(input_ids.float() / 32)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def test_a_model_that_is_none_of_transformers_learns_from_one(train):
    teacher = Classifier()
    teacher.linear.weight.data.neg_()
    trainer = train(Classifier(), make_data("bert", 32), trainer_kwargs={"teacher": teacher}, **PLAIN)
    assert logged(trainer, "distillation_loss")[-1] < logged(trainer, "distillation_loss")[0]


class Headless(Classifier):
    """A teacher without logits."""

    def forward(self, input_ids):
        return {"features": input_ids}


def test_logits_that_do_not_match_are_refused(train):
    data = make_data("bert", 8)
    for teacher, message in (
        (
            Classifier(5),
            r"teacher's logits have the shape \(8, 5\), the model's \(8, 3\): take a teacher with the same",
        ),
        (Headless(), r"the teacher returned none \(only features\): take a model with one head"),
    ):
        with pytest.raises(ValueError, match=message):
            train(make_bert(), data, trainer_kwargs={"teacher": teacher}, **PLAIN)


@pytest.mark.parametrize("size", ["get_tp_size", "get_cp_size", "get_sp_size"])
def test_parts_of_models_and_sequences_are_refused(make_trainer, monkeypatch, size):
    trainer = make_trainer(make_bert(), make_data("bert", 8), **START)
    monkeypatch.setattr(trainer, size, lambda: 2)
    with pytest.raises(ValueError, match="no tensor, context or sequence parallelism: use DDP, or FSDP2"):
        trainer.train()


def test_several_devices_in_one_process_are_refused(make_trainer):
    trainer = make_trainer(make_bert(), make_data("bert", 8), **START)
    trainer.args._n_gpu = 2
    with pytest.raises(ValueError, match="needs a process for each GPU: start with accelerate launch"):
        trainer.train()


def test_a_batch_without_labels_is_refused(make_trainer):
    trainer = make_trainer(make_bert(), [], **START)
    outputs = {"logits": torch.zeros(1, 3, requires_grad=True)}
    with pytest.raises(ValueError, match="needs labels, to know which items count; the batch has input_ids"):
        trainer.distillation.mix(torch.zeros(()), outputs, {"input_ids": torch.zeros(1, 4)}, 1, scaled=True)


def test_tasks_without_classes_are_refused(train):
    regression = [{**example, "labels": float(example["labels"])} for example in make_data("bert", 8)]
    config = BertConfig(**{**make_bert().config.to_dict(), "num_labels": 1})
    student = BertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"one class per row or token, but labels of type torch.float32"):
        train(student, regression, **START)


def test_a_student_in_hand_is_copied_not_kept(make_trainer):
    model = make_gpt2()
    trainer = make_trainer(model, [], **START)
    assert trainer.teacher is not model
    assert_same(snapshot(trainer.teacher), snapshot(deepcopy(model)))
