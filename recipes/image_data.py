"""Image data sets of the recipes: the embedded digits, a folder of images, or any data set of the Hub."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, load_dataset
from sklearn.datasets import load_digits

SPLIT_SEED = 0
DIGITS_TEST_SHARE = 0.35


def load_images(name: str, image_column: str, label_column: str, evaluate_on: str, config: str | None) -> DatasetDict:
    """Load a data set as the splits `train` and `evaluation`.

    Args:
        name: `digits`, a directory laid out as an imagefolder, or a name on the Hub.
        image_column: column of the images.
        label_column: column of the class labels.
        evaluate_on: a split of the data set, or `validation_from_train`: a stratified fifth of the training data, held
            out with a fixed seed. Choose hyper-parameters there and leave the test split alone.
        config: configuration of a data set on the Hub.

    Raises:
        ValueError: for a missing split or column, or labels that are not classes.
    """
    if name == "digits":
        splits = _digits(image_column, label_column)
    elif Path(name).is_dir():
        splits = load_dataset("imagefolder", data_dir=name)
    else:
        splits = load_dataset(name, config)
    for column in (image_column, label_column):
        if column not in splits["train"].column_names:
            raise ValueError(f"{name} has no column {column!r}; it has {splits['train'].column_names}")
    if not isinstance(splits["train"].features[label_column], ClassLabel):
        raise ValueError(f"column {label_column!r} of {name} does not hold class labels; cast it to ClassLabel")
    if evaluate_on == "validation_from_train":
        parts = splits["train"].train_test_split(0.2, seed=SPLIT_SEED, stratify_by_column=label_column)
        return DatasetDict(train=parts["train"], evaluation=parts["test"])
    if evaluate_on not in splits:
        raise ValueError(f"{name} has no split {evaluate_on!r}; it has {list(splits)} and validation_from_train")
    return DatasetDict(train=splits["train"], evaluation=splits[evaluate_on])


def to_pixels(processor: Any, image_column: str, label_column: str) -> Callable[[dict[str, list]], dict[str, Any]]:
    """Make the transform of a batch: images through the processor, labels as they are."""

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [image.convert("RGB") for image in batch[image_column]]
        return {
            "pixel_values": processor(images=images, return_tensors="pt")["pixel_values"],
            "labels": batch[label_column],
        }

    return transform


def _digits(image_column: str, label_column: str) -> DatasetDict:
    """scikit-learn's 1,797 handwritten digits of 8×8 pixels, split 65/35, stratified, with a fixed seed."""
    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = Features(
        {image_column: Image(), label_column: ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    data = Dataset.from_dict({image_column: list(images), label_column: digits.target.tolist()}, features=features)
    return data.train_test_split(DIGITS_TEST_SHARE, seed=SPLIT_SEED, stratify_by_column=label_column)
