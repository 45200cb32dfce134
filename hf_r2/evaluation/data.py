"""Labelled data by name: what figures are measured on, and how the same examples are found again."""

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import (
    ClassLabel,
    Dataset,
    DatasetDict,
    Features,
    Image,
    IterableDataset,
    IterableDatasetDict,
    Value,
    load_dataset,
    load_from_disk,
)
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

from hf_r2.evaluation.standard_library import STANDARD_LIBRARY, load_standard_library

DIGITS = "digits"
EMBEDDED = (DIGITS, *STANDARD_LIBRARY)
"""Names of the data sets that need no network."""

DIGITS_TEST_SHARE = 0.35
VALIDATION_FROM_TRAIN = "validation_from_train"
SPLIT_SEED = 0


@dataclass(frozen=True)
class LabelledData:
    """Names labelled examples, so that figures can be measured on them again.

    Args:
        name: `digits` (scikit-learn's), `python-bracket-depth`, `python-packages` or `python-sources` (the standard
            library's, see [`load_standard_library`]), a directory, or a data set on the Hub.
        split: one of its splits, or `validation_from_train`: see [`take_split`].
        inputs: columns of what the model sees: one of images, or one or two of text.
        label: column of the class labels, as indices or names; None for language models.
        config: configuration of a data set on the Hub.
        revision: its commit, the newest without; of the standard library's, the version of Python.
        context: tokens of a sequence, for language models.
    """

    name: str
    split: str = "test"
    inputs: Sequence[str] = ("image",)
    label: str | None = "label"
    config: str | None = None
    revision: str | None = None
    context: int | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], name: str | None = None) -> "LabelledData":
        """Find the data that a manifest names; `name` says where they are, if they are not where they were.

        Raises:
            ValueError: if they were in a directory, and nothing says where that is.
        """
        keys = ("split", "inputs", "label", "config", "revision", "context")
        known = {key: facts[key] for key in keys if key in facts}
        if name is not None and name not in STANDARD_LIBRARY:
            known.pop("revision", None)
        name = name or facts.get("hub_name") or (facts["name"] if facts["name"] in EMBEDDED else None)
        if name is None:
            raise ValueError(f"its data {facts['name']!r} is not on the Hub: say where it is with --data")
        return cls(name, **known)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest notes: all that is needed to load the data again, but no path of this machine."""
        folder = os.path.isdir(self.name)
        names = {"name": Path(self.name).absolute().name if folder else self.name}
        names["hub_name"] = self.name if _on_the_hub(self.name) else None
        revision = platform.python_version() if self.name in STANDARD_LIBRARY else None
        return {**asdict(self), **names, "revision": self.revision or revision}

    def load(self) -> Dataset:
        """Load the examples.

        Raises:
            ValueError: for a split or column that the data does not have, and labels that are no class indices.
            OSError: if they cannot be reached.
        """
        data = take_split(self._splits(), self.split, self.label, self.name)
        self._require_columns(data)
        self._require_every_label(data)
        return data

    def load_with_training(
        self, streaming: bool = False
    ) -> tuple[Dataset, Dataset] | tuple[IterableDataset, IterableDataset]:
        """Load what to train on, and the examples to evaluate on, which are not among them.

        Args:
            streaming: read the examples when they are needed instead of all of them before.

        Raises:
            ValueError: as [`load`] does, and for data that cannot be streamed, or has no split `train`.
            OSError: if they cannot be reached.
        """
        splits = self._splits(streaming)
        if "train" not in splits:
            raise ValueError(f"{self.name} has no split 'train' to train on; it has {list(splits)}")
        self._require_columns(splits["train"])
        if self.split == VALIDATION_FROM_TRAIN:
            if streaming:
                raise ValueError(f"nothing can be held out of a stream: evaluate on one of {list(splits)}")
            parts = hold_out(splits["train"], self.label, self.name)
            return parts["train"], parts["test"]
        evaluation = take_split(splits, self.split, self.label, self.name)
        self._require_columns(evaluation)
        if not streaming:
            self._require_every_label(evaluation)
        return splits["train"], evaluation

    def _splits(self, streaming: bool = False) -> DatasetDict | IterableDatasetDict:
        splits = load_splits(self.name, self.config, self.revision, streaming)
        return splits if self.label is None or streaming else with_classes(splits, self.label)

    def _require_columns(self, data: Dataset | IterableDataset) -> None:
        for column in (*self.inputs, *([] if self.label is None else [self.label])):
            require_column(data, column, self.name)
        feature = None if self.label is None else data.features[self.label]
        if feature is not None and not isinstance(feature, ClassLabel) and "int" not in str(feature.dtype):
            raise ValueError(f"column {self.label!r} of {self.name} does not hold class indices; cast it to ClassLabel")

    def _require_every_label(self, data: Dataset) -> None:
        if self.label is not None and len(data) and min(data.unique(self.label)) < 0:
            raise ValueError(
                f"the labels of the {self.split} split of {self.name} are kept secret (−1): evaluate on another split"
            )


def with_classes(splits: DatasetDict, label: str) -> DatasetDict:
    """Turn labels that are names into classes, numbered in the order of the alphabet; leave others as they are."""
    columns = {split: data.features.get(label) for split, data in splits.items()}
    if not all(isinstance(column, Value) and "string" in column.dtype for column in columns.values()):
        return splits
    names = sorted({name for data in splits.values() for name in data.unique(label)})
    return splits.cast_column(label, ClassLabel(names=names))


def class_names(data: Dataset | IterableDataset, label: str) -> list[str]:
    """Return the names of the classes; of class indices without names, their numbers."""
    feature = data.features[label]
    return feature.names if isinstance(feature, ClassLabel) else [str(i) for i in range(max(data.unique(label)) + 1)]


def load_splits(
    name: str, config: str | None = None, revision: str | None = None, streaming: bool = False
) -> DatasetDict | IterableDatasetDict:
    """Load a data set with all its splits: see [`LabelledData`] for the names.

    Raises:
        ValueError: for digits without scikit-learn, a directory that `datasets` cannot read, data that cannot be
            streamed, and as [`load_standard_library`] does.
        OSError: if it cannot be reached.
    """
    saved_by_datasets = any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json"))
    if streaming and (name in EMBEDDED or saved_by_datasets):
        raise ValueError(f"{name} is not read from files one by one, so it cannot be streamed")
    if name == DIGITS:
        return _digits()
    if name in STANDARD_LIBRARY:
        return load_standard_library(name, revision)
    if not os.path.isdir(name):
        return load_dataset(name, config, revision=revision, streaming=streaming)
    if not saved_by_datasets:
        return load_dataset(name, streaming=streaming)
    saved = load_from_disk(name)
    return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "test"): saved})


def take_split(splits: DatasetDict, split: str, label: str | None, name: str) -> Dataset:
    """Take a split by name, or `validation_from_train`: what [`hold_out`] takes from the training data.

    Raises:
        ValueError: naming the splits that there are; and as [`hold_out`] does.
    """
    if split == VALIDATION_FROM_TRAIN and "train" in splits:
        return hold_out(splits["train"], label, name)["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {list(splits)} and {VALIDATION_FROM_TRAIN}")
    return splits[split]


def hold_out(train: Dataset, label: str | None, name: str) -> DatasetDict:
    """Split a fifth off as `test`, stratified by label if there is one, with a fixed seed; the rest is `train`.

    Raises:
        ValueError: without the column of labels, and for the standard library's: texts of one file are alike, and would
            be on both sides.
    """
    if name in STANDARD_LIBRARY:
        raise ValueError(f"{name} is split by file: its split for choosing hyper-parameters is 'validation'")
    if label is not None:
        require_column(train, label, name)
    return train.train_test_split(0.2, seed=SPLIT_SEED, stratify_by_column=label)


def first_examples(data: Dataset, count: int) -> Dataset:
    """Take the first examples, at most this many."""
    return data.select(range(min(count, len(data))))


def require_column(data: Dataset | IterableDataset, column: str, name: str) -> None:
    """Check that data have a column.

    Raises:
        ValueError: naming the columns that there are.
    """
    if column not in data.column_names:
        raise ValueError(f"{name} has no column {column!r}; it has {data.column_names}")


def hub_revision(name: str) -> str | None:
    """Return the commit of a data set on the Hub; None for other data, and if the Hub cannot be reached."""
    if not _on_the_hub(name):
        return None
    try:
        return HfApi().dataset_info(name).sha
    except (OSError, HTTPError):
        return None


def to_pixels(processor: Any, image_column: str, label_column: str) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Make the transform of a batch: images through the processor, labels as they are."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[image_column]]
        return {
            "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
            "labels": batch[label_column],
        }

    return transform


def to_tokens(
    tokenizer: Any, text_columns: Sequence[str], label_column: str
) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Make the transform of a batch: texts, or pairs of them, through the tokenizer, labels as they are."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        tokens = tokenizer(*(list(batch[column]) for column in text_columns), truncation=True)
        return {**tokens, "labels": batch[label_column]}

    return transform


def _on_the_hub(name: str) -> bool:
    return name not in EMBEDDED and not os.path.isdir(name)


def _digits() -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, split 65/35, stratified, with a fixed seed."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ValueError("the data set 'digits' is scikit-learn's: pip install scikit-learn") from error
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(name) for name in digits.target_names])})
    data = Dataset.from_dict({"image": list(images), "label": digits.target.tolist()}, features=features)
    return data.train_test_split(DIGITS_TEST_SHARE, seed=SPLIT_SEED, stratify_by_column="label")
