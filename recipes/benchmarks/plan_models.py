"""Three small trained classifiers and their data, for plan.py: everything ships with Python and scikit-learn."""

import importlib
import re
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from study.examples import Examples, digits
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from hf_r2.files import atomic_directory

PACKAGES = ("asyncio", "email", "http", "importlib", "json", "logging", "multiprocessing", "unittest", "xml")
WINDOW = 48
VOCABULARY = 2000
SGD = {"optim": "sgd", "optim_args": "momentum=0.9", "learning_rate": 0.1, "weight_decay": 5e-4, "warmup_steps": 50}
ADAMW = {"optim": "adamw_torch", "learning_rate": 1e-3, "weight_decay": 0.01, "warmup_steps": 100}


@dataclass(frozen=True)
class Case:
    """A model of the benchmark: its data, its structure, and how it is trained."""

    data: str
    model: dict
    training: dict
    steps: int


def resnet(**sizes: object) -> dict:
    return {"layer_type": "basic", "num_labels": 10, **sizes}


CASES = {
    "digits-resnet": Case(
        "digits", resnet(embedding_size=16, hidden_sizes=[16, 32, 64], depths=[1, 1, 1]), SGD, steps=600
    ),
    "bert": Case(
        "sources",
        {
            "vocab_size": VOCABULARY + 2,
            "hidden_size": 128,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 512,
            "max_position_embeddings": WINDOW,
            "initializer_range": 0.05,
            "num_labels": len(PACKAGES),
        },
        ADAMW,
        steps=600,
    ),
    "resnet18": Case("digits", resnet(hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]), SGD, steps=300),
}


def build(case: Case) -> PreTrainedModel:
    if case.data == "digits":
        return ResNetForImageClassification(ResNetConfig(**case.model))
    return BertForSequenceClassification(BertConfig(**case.model))


def train(case: Case, directory: Path, steps: int | None = None) -> None:
    """Train a model from scratch and save it as a float checkpoint."""
    set_seed(0)
    model = build(case)
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch,
            max_steps=steps or case.steps,
            lr_scheduler_type="cosine",
            per_device_train_batch_size=64,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            **case.training,
        )
        Trainer(model=model, args=arguments, train_dataset=DATA[case.data]().train).train()
    with atomic_directory(directory) as scratch:
        model.save_pretrained(scratch)


class Parts(NamedTuple):
    """Examples, none of them in two parts: what a model is trained on, what a plan measures, what figures are of."""

    train: Examples
    calibration: Examples
    test: Examples


def digits_in_parts() -> Parts:
    """Handwritten digits, the test part that of the recipes."""
    return Parts(*digits("validation"), digits("test")[1])


@cache
def sources() -> Parts:
    """Windows of Python's own sources, to be told apart by package: three fifths to train on, one for each other."""
    windows: list[tuple[list[str], int]] = []
    for label, name in enumerate(PACKAGES):
        for file in sorted(Path(importlib.import_module(name).__file__).parent.rglob("*.py")):
            words = re.findall(r"\w+|[^\w\s]", file.read_text(encoding="utf-8"))
            cuts = range(0, len(words) - WINDOW + 1, WINDOW)
            windows += [(words[start : start + WINDOW], label) for start in cuts]
    common = Counter(word for words, _ in windows for word in words).most_common(VOCABULARY)
    numbers = {word: index for index, (word, _) in enumerate(common, start=2)}  # 0 pads, 1 is any other word
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = torch.tensor([[numbers.get(word, 1) for word in windows[index][0]] for index in order])
    labels = torch.tensor([windows[index][1] for index in order])
    fifths = torch.arange(len(order)) % 5
    return Parts(*(Examples(input_ids=tokens[p], labels=labels[p]) for p in (fifths < 3, fifths == 3, fifths == 4)))


DATA = {"digits": digits_in_parts, "sources": sources}
