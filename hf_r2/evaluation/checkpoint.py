"""Evaluation of checkpoints on data by name."""

import os
from typing import Any

import torch
import transformers
from datasets import Dataset
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    default_data_collator,
)

# The name at the top level needs torchvision in transformers 5.10
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_r2.evaluation.classification import evaluate_classifier
from hf_r2.evaluation.data import LabelledData, to_pixels, to_tokens

MODEL_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
}
"""Class that loads a model of a task."""

_TASKS = {"ForImageClassification": "image-classification", "ForSequenceClassification": "text-classification"}


def task_of(source: str | os.PathLike[str]) -> str:
    """Return the task of a checkpoint by its architecture, in the Hub's words.

    Raises:
        ValueError: for a task that cannot be evaluated.
    """
    architecture = (AutoConfig.from_pretrained(source).architectures or ["none"])[0]
    for ending, task in _TASKS.items():
        if architecture.endswith(ending):
            return task
    raise ValueError(f"{source} is a {architecture}: what can be evaluated is {', '.join(MODEL_CLASSES)}")


def evaluate_checkpoint(
    source: str | os.PathLike[str],
    data: LabelledData,
    float_source: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Measure a checkpoint, compressed or float, on labelled data.

    Args:
        source: directory or Hub name of a classifier of images or texts, with its image processor or tokenizer.
        data: what it is measured on.
        float_source: the checkpoint that it was compressed from, to compare it with.
        batch_size: examples of a batch.

    Returns:
        The figures of [`evaluate_classifier`].

    Raises:
        ValueError: for tasks other than these, and as [`LabelledData.load`] does.
    """
    task = task_of(source)
    model = _load(source, task)
    float_model = None if float_source is None else _load(float_source, task)
    examples = data.load()
    _require_same_classes(model, getattr(examples.features[data.label], "names", None), data.name)
    return evaluate_classifier(model, batches_of(source, data, examples, batch_size), float_model=float_model)


def batches_of(
    source: str | os.PathLike[str], data: LabelledData, examples: Dataset, batch_size: int = 64
) -> DataLoader:
    """Read examples as a checkpoint does, by its image processor or tokenizer, in batches with `labels`.

    Raises:
        ValueError: for tasks that cannot be evaluated.
    """
    if task_of(source) == "image-classification":
        transform = to_pixels(AutoImageProcessor.from_pretrained(source), data.inputs[0], data.label)
        collate = default_data_collator
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        transform, collate = to_tokens(tokenizer, data.inputs, data.label), DataCollatorWithPadding(tokenizer)
    return DataLoader(examples.with_transform(transform), batch_size=batch_size, collate_fn=collate)


def _load(source: str | os.PathLike[str], task: str) -> PreTrainedModel:
    model = getattr(transformers, MODEL_CLASSES[task]).from_pretrained(source)
    return model.to("cuda" if torch.cuda.is_available() else "cpu")


def _require_same_classes(model: PreTrainedModel, labels: list[str] | None, name: str) -> None:
    """Check that data with named classes number them as the model does."""
    known = [str(model.config.id2label[index]) for index in range(model.config.num_labels)]
    if labels is None or labels == known:
        return
    if len(labels) > len(known) or sorted(labels) == sorted(known):
        raise ValueError(f"{name} has the classes {labels}, the model {known}: they must be the same in the same order")
