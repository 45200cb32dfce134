"""Evaluation of checkpoints on data by name."""

import os
from dataclasses import replace
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
from hf_r2.evaluation.data import LabelledData, first_examples, to_pixels, to_tokens
from hf_r2.evaluation.language_modeling import evaluate_language_model
from hf_r2.evaluation.sequences import pack

LONGEST_CONTEXT = 1024
"""Tokens of a sequence that a language model is measured on, if it can take as many and nothing else is said."""

MODEL_CLASSES = {
    "image-classification": "AutoModelForImageClassification",
    "text-classification": "AutoModelForSequenceClassification",
    "text-generation": "AutoModelForCausalLM",
}
"""Class that loads a model of a task."""

_ENDINGS = {
    "ForImageClassification": "image-classification",
    "ForSequenceClassification": "text-classification",
    "ForCausalLM": "text-generation",
    "LMHeadModel": "text-generation",
}


def task_of(source: str | os.PathLike[str]) -> str:
    """Return the task of a checkpoint by its architecture, in the Hub's words.

    Raises:
        ValueError: for a task that cannot be evaluated.
    """
    architecture = (AutoConfig.from_pretrained(source).architectures or ["none"])[0]
    task = task_of_architecture(architecture)
    if task is None:
        raise ValueError(f"{source} is a {architecture}: what can be evaluated is {', '.join(MODEL_CLASSES)}")
    return task


def task_of_architecture(architecture: str) -> str | None:
    """Return the task of a model class by its name, in the Hub's words; None for others than those of this package."""
    return next((task for ending, task in _ENDINGS.items() if architecture.endswith(ending)), None)


def as_seen_by(source: str | os.PathLike[str], data: LabelledData) -> LabelledData:
    """Return the data as a checkpoint reads it: a language model sees sequences, and no labels."""
    if task_of(source) != "text-generation":
        return data
    longest = getattr(AutoConfig.from_pretrained(source), "max_position_embeddings", None) or LONGEST_CONTEXT
    return replace(data, label=None, context=data.context or min(longest, LONGEST_CONTEXT))


def evaluate_checkpoint(
    source: str | os.PathLike[str],
    data: LabelledData,
    float_source: str | os.PathLike[str] | None = None,
    batch_size: int = 64,
) -> dict[str, Any]:
    """Measure a checkpoint, compressed or float, on labelled data, or a language model on texts.

    Args:
        source: directory or Hub name of a classifier of images or texts, or of a causal language model, with its image
            processor or tokenizer.
        data: what it is measured on.
        float_source: the checkpoint that it was compressed from, to compare it with.
        batch_size: examples of a batch.

    Returns:
        The figures of [`evaluate_classifier`], or of [`evaluate_language_model`].

    Raises:
        ValueError: for tasks other than these, and as [`LabelledData.load`] does.
    """
    task = task_of(source)
    data = as_seen_by(source, data)
    model = _load(source, task)
    float_model = None if float_source is None else _load(float_source, task)
    examples = data.load()
    measure = evaluate_language_model if task == "text-generation" else evaluate_classifier
    if data.label is not None:
        _require_same_classes(model, getattr(examples.features[data.label], "names", None), data.name)
    return measure(model, batches_of(source, data, examples, batch_size), float_model=float_model)


def batches_of(
    source: str | os.PathLike[str], data: LabelledData, examples: Dataset, batch_size: int = 64
) -> DataLoader:
    """Read examples as a checkpoint does, by its image processor or tokenizer, in batches with `labels`.

    Raises:
        ValueError: for tasks that cannot be evaluated.
    """
    task = task_of(source)
    if task == "text-generation":
        tokenizer = AutoTokenizer.from_pretrained(source)
        sequences = pack(examples, tokenizer, data.inputs[0], as_seen_by(source, data).context)
        return DataLoader(sequences, batch_size=batch_size, collate_fn=default_data_collator)
    if task == "image-classification":
        transform = to_pixels(AutoImageProcessor.from_pretrained(source), data.inputs[0], data.label)
        collate = default_data_collator
    else:
        tokenizer = AutoTokenizer.from_pretrained(source)
        transform, collate = to_tokens(tokenizer, data.inputs, data.label), DataCollatorWithPadding(tokenizer)
    return DataLoader(examples.with_transform(transform), batch_size=batch_size, collate_fn=collate)


def calibration_batches(
    source: str | os.PathLike[str], data: LabelledData, count: int, batch_size: int = 64
) -> DataLoader:
    """Load the first examples, at most this many, and read them as [`batches_of`] does."""
    return batches_of(source, data, first_examples(data.load(), count), batch_size)


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
