"""Labelled data by name: what figures are measured on, and how the same examples are found again."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset, load_from_disk
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError

DIGITS = "digits"
DIGITS_TEST_SHARE = 0.35
VALIDATION_FROM_TRAIN = "validation_from_train"
SPLIT_SEED = 0


@dataclass(frozen=True)
class LabelledData:
    """Names labelled examples, so that figures can be measured on them again.

    Args:
        name: `digits` (scikit-learn's), a directory, or a data set on the Hub.
        split: one of its splits, or `validation_from_train`: see [`take_split`].
        inputs: columns of what the model sees: one of images, or one or two of text.
        label: column of the class labels.
        config: configuration of a data set on the Hub.
        revision: its commit; the newest without.
    """

    name: str
    split: str = "test"
    inputs: Sequence[str] = ("image",)
    label: str = "label"
    config: str | None = None
    revision: str | None = None

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], name: str | None = None) -> "LabelledData":
        """Find the data that a manifest names; `name` says where they are, if they are not where they were.

        Raises:
            ValueError: if they were in a directory, and nothing says where that is.
        """
        known = {key: facts[key] for key in ("split", "inputs", "label", "config", "revision") if facts.get(key)}
        if name is not None:
            known.pop("revision", None)
        name = name or facts.get("hub_name") or (DIGITS if facts["name"] == DIGITS else None)
        if name is None:
            raise ValueError(f"its data {facts['name']!r} is not on the Hub: say where it is with --data")
        return cls(name, **known)

    def facts(self) -> dict[str, Any]:
        """Return what a manifest notes: all that is needed to load the data again, but no path of this machine."""
        folder = os.path.isdir(self.name)
        names = {"name": Path(self.name).absolute().name if folder else self.name}
        names["hub_name"] = self.name if _on_the_hub(self.name) else None
        return {**asdict(self), **names}

    def load(self) -> Dataset:
        """Load the examples.

        Raises:
            ValueError: for a split or column that the data does not have, and labels that are no class indices.
            OSError: if they cannot be reached.
        """
        data = take_split(load_splits(self.name, self.config, self.revision), self.split, self.label, self.name)
        for column in (*self.inputs, self.label):
            require_column(data, column, self.name)
        if not isinstance(data.features[self.label], ClassLabel) and "int" not in str(data.features[self.label].dtype):
            raise ValueError(f"column {self.label!r} of {self.name} does not hold class indices; cast it to ClassLabel")
        return data


def load_splits(name: str, config: str | None = None, revision: str | None = None) -> DatasetDict:
    """Load a data set with all its splits: see [`LabelledData`] for the names.

    Raises:
        ValueError: for digits without scikit-learn, and a directory that `datasets` cannot read.
        OSError: if it cannot be reached.
    """
    if name == DIGITS:
        return _digits()
    if not os.path.isdir(name):
        return load_dataset(name, config, revision=revision)
    if not any((Path(name) / marker).is_file() for marker in ("dataset_dict.json", "state.json")):
        return load_dataset(name)
    saved = load_from_disk(name)
    return saved if isinstance(saved, DatasetDict) else DatasetDict({str(saved.split or "test"): saved})


def take_split(splits: DatasetDict, split: str, label: str, name: str) -> Dataset:
    """Take a split by name, or `validation_from_train`: what [`hold_out`] takes from the training data.

    Raises:
        ValueError: naming the splits that there are.
    """
    if split == VALIDATION_FROM_TRAIN and "train" in splits:
        require_column(splits["train"], label, name)
        return hold_out(splits["train"], label)["test"]
    if split not in splits:
        raise ValueError(f"{name} has no split {split!r}; it has {list(splits)} and {VALIDATION_FROM_TRAIN}")
    return splits[split]


def hold_out(train: Dataset, label: str) -> DatasetDict:
    """Split a stratified fifth off as `test`, with a fixed seed; the rest is `train`."""
    return train.train_test_split(0.2, seed=SPLIT_SEED, stratify_by_column=label)


def require_column(data: Dataset, column: str, name: str) -> None:
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
    return name != DIGITS and not os.path.isdir(name)


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
