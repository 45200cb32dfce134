"""Images of the recipes: in memory, on disk or streamed, augmented or not."""

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from augmentation import Augment
from datasets import Dataset, IterableDataset

from hf_r2.evaluation.data import first_examples, to_pixels

SHUFFLE_BUFFER = 10_000
"""Images, still encoded, that a stream is shuffled within."""


class AugmentedImages(torch.utils.data.Dataset):
    """Images of a data set, augmented anew in every epoch.

    Args:
        images: examples with RGB or gray images.
        augment: see [`make_augmentation`].
        processor: scales the augmented images.
        columns: of the images and of the labels.
        seed: of the draws.
    """

    def __init__(self, images: Dataset, augment: Augment, processor: Any, columns: tuple[str, str], seed: int) -> None:
        self.images = images
        self.transform = to_augmented_pixels(processor, columns, augment, seed)
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch whose draws are used."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        batch = self.transform(self.images[list(indices)], [(self.epoch, index) for index in indices])
        return [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]


def stream_augmented(
    images: IterableDataset, augment: Augment, processor: Any, columns: tuple[str, str], seed: int
) -> IterableDataset:
    """Shuffle a stream and augment its images, by draws for their places in the epoch."""
    transform = to_augmented_pixels(processor, columns, augment, seed)
    return _map(images.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), transform, with_indices=True)


def to_augmented_pixels(
    processor: Any, columns: tuple[str, str], augment: Augment, seed: int
) -> Callable[[dict[str, list], Sequence[Any]], dict[str, Any]]:
    """Make the transform of a training batch, whose images are augmented by the draws for their places and scaled."""
    to_scaled = to_pixels(partial(processor, do_resize=False, do_center_crop=False), *columns)

    def transform(batch: dict[str, list], places: Sequence[Any]) -> dict[str, Any]:
        images = [
            augment(image.convert("RGB"), random.Random(f"{seed} {place}"))
            for image, place in zip(batch[columns[0]], places, strict=True)
        ]
        return to_scaled({**batch, columns[0]: images})

    return transform


def on_access(
    images: Dataset | IterableDataset, transform: Callable[[dict[str, list]], dict[str, Any]], seed: int | None = None
) -> Dataset | IterableDataset:
    """Transform batches when they are read; with a seed, a stream is shuffled."""
    if isinstance(images, Dataset):
        return images.with_transform(transform)
    return _map(images if seed is None else images.shuffle(seed=seed, buffer_size=SHUFFLE_BUFFER), transform)


def take_examples(images: Dataset | IterableDataset, count: int) -> Dataset:
    """Take the first examples, at most this many, for random access."""
    if isinstance(images, IterableDataset):
        return Dataset.from_list(list(images.take(count)), features=images.features)
    return first_examples(images, count)


def input_size(processor: Any) -> int:
    """Return the side of the square images that a processor makes, in pixels.

    Raises:
        ValueError: for a processor that makes others.
    """
    sizes = [size for size in (getattr(processor, "crop_size", None), processor.size) if size]
    side = next((size[key] for size in sizes for key in ("height", "shortest_edge") if size.get(key)), None)
    if side is None:
        raise ValueError(f"{type(processor).__name__} makes no square images to crop for: use augmentation none")
    return side


def _map(images: IterableDataset, transform: Callable[..., dict[str, Any]], with_indices: bool = False) -> Any:
    options = {"batched": True, "batch_size": 64, "remove_columns": images.column_names}
    return images.map(transform, with_indices=with_indices, **options)
