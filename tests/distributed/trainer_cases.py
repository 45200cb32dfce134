"""Trainings with tiny models of odd sizes, as data: what `trainer_run.py` is given, and what it returns."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training_cases import FixedNormResNetForImageClassification, make_data, make_fixed_norm_resnet
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)
from transformers.distributed import DistributedConfig

EXAMPLES = 32
# How two processes train: the accelerate config, and whether transformers cuts the model when it loads it
DISTRIBUTIONS = {"ddp": ("ddp", False), "fsdp2_of_transformers": ("ddp", True), "fsdp2_of_accelerate": ("fsdp2", False)}


@dataclass
class Case:
    """One training.

    Args:
        model: a name of `MODELS`.
        arguments: of the trainer; the `r2_teacher` "saved" is a teacher that `save_models` has made.
        fsdp2: whether transformers cuts the model; that accelerate does is a matter of the launch.
        trainer: a name of `trainer_run.TRAINERS`.
        estranged: whether all processes but the first start from other weights, which its weights then replace.
        train: whether to train at all.
        evaluate: whether to evaluate in the end.
        resume: CASE/CHECKPOINT.
        quantization: of the R2QuantizationConfig, for `r2_aware`, beside codec, bits and grain.
    """

    model: str
    arguments: dict[str, Any]
    fsdp2: bool = False
    trainer: str = "R2Trainer"
    estranged: bool = False
    train: bool = True
    evaluate: bool = False
    resume: str | None = None
    quantization: dict[str, Any] = field(default_factory=dict)


def write_cases(directory, cases):
    (directory / "cases.json").write_text(json.dumps({name: asdict(case) for name, case in cases.items()}))


def read_cases(directory):
    return {name: Case(**case) for name, case in json.loads((directory / "cases.json").read_text()).items()}


@dataclass
class Result:
    """What one process found.

    Args:
        error: the traceback, if there was one; nothing else counts then.
        processes: how many trained.
        held: elements held here and in all once trained, by parameter.
        logs: those of training steps.
        eval_loss: after training.
        messages: of hf_r2's logger.
        change: largest, of learnable values.
        weights: whole, by name.
        learned: learnable values and chosen strengths, by name.
        directory: of its files.
    """

    error: str | None = None
    processes: int = 0
    held: dict[str, list[int]] = field(default_factory=dict)
    logs: list[dict[str, float]] = field(default_factory=list)
    eval_loss: float | None = None
    messages: list[str] = field(default_factory=list)
    change: float = 0.0
    weights: dict[str, Tensor] = field(default_factory=dict)
    learned: dict[str, Tensor] = field(default_factory=dict)
    directory: Path | None = None

    def save(self, directory, rank):
        directory.mkdir(parents=True, exist_ok=True)
        values = asdict(self)
        del values["directory"]
        for name in ("weights", "learned"):
            save_file(values.pop(name), directory / f"{name}-{rank}.safetensors")
        (directory / f"result-{rank}.json").write_text(json.dumps(values))

    @classmethod
    def load(cls, directory, rank=0):
        result = cls(
            **json.loads((directory / f"result-{rank}.json").read_text()),
            **{name: load_file(directory / f"{name}-{rank}.safetensors") for name in ("weights", "learned")},
            directory=directory,
        )
        assert result.error is None, result.error
        return result

    def logged(self, key):
        return [entry[key] for entry in self.logs]


# --- models ---------------------------------------------------------------------------------------------------------


def make_bert(labels=3):
    torch.manual_seed(2)
    return BertForSequenceClassification(
        BertConfig(
            vocab_size=32,
            hidden_size=15,
            num_hidden_layers=1,
            num_attention_heads=3,
            intermediate_size=35,
            max_position_embeddings=16,
            hidden_dropout_prob=0,
            attention_probs_dropout_prob=0,
            initializer_range=0.2,
            num_labels=labels,
        )
    )


def make_bert_regression():
    """Its classifier has one output channel: the second of two processes holds none of it."""
    return make_bert(labels=1)


def make_gpt2():
    """Its weights are those of transformers' Conv1D: FSDP2 cuts them along their inputs."""
    torch.manual_seed(4)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=32,
            bos_token_id=0,
            eos_token_id=0,
            n_positions=16,
            n_embd=15,
            n_inner=35,
            n_layer=1,
            n_head=3,
            resid_pdrop=0,
            embd_pdrop=0,
            attn_pdrop=0,
            initializer_range=0.2,
        )
    )


def make_llama():
    torch.manual_seed(3)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=33,
            hidden_size=18,
            intermediate_size=35,
            num_hidden_layers=1,
            num_attention_heads=3,
            num_key_value_heads=3,
            max_position_embeddings=16,
            initializer_range=0.2,
            tie_word_embeddings=False,
        )
    )


class Model(NamedTuple):
    """How a model is made, its class, and what FSDP2 cuts on its own beside the rest.

    Args:
        make: makes it.
        model_class: its class.
        layer: class of the layers, for accelerate's FSDP2.
        plan: for transformers' FSDP2, where it does not know.
    """

    make: Callable[[], PreTrainedModel]
    model_class: type[PreTrainedModel]
    layer: str = ""
    plan: dict[str, str] | None = None


BERT_PLAN = {"bert.encoder.layer.*": "free_full_weight"}
MODELS = {
    "bert": Model(make_bert, BertForSequenceClassification, "BertLayer", BERT_PLAN),
    "bert_regression": Model(make_bert_regression, BertForSequenceClassification, "BertLayer", BERT_PLAN),
    "gpt2": Model(make_gpt2, GPT2LMHeadModel, "GPT2Block", {"transformer.h.*": "free_full_weight"}),
    "llama": Model(make_llama, LlamaForCausalLM, "LlamaDecoderLayer"),
    "fixed_norm_resnet": Model(make_fixed_norm_resnet, FixedNormResNetForImageClassification),
}


def save_models(directory):
    """Save them all, so that every training of a model starts from the same weights; and a teacher for each."""
    for name, model in MODELS.items():
        made = model.make()
        made.save_pretrained(directory / name)
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.add_(0.2 * torch.randn(parameter.shape))
        made.save_pretrained(directory / f"{name}_teacher")


def load_model(name, directory, fsdp2):
    model = MODELS[name]
    options = {"distributed_config": DistributedConfig(fsdp_size=2, fsdp_plan=model.plan)} if fsdp2 else {}
    return model.model_class.from_pretrained(directory / name, **options)


def examples(name):
    data = make_data(name, EXAMPLES)
    if name == "bert_regression":
        data = [{**example, "labels": float(example["labels"])} for example in data]
    return data
