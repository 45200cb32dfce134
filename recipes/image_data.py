"""Images of the recipes: in memory, on disk or streamed, augmented or not."""

from collections.abc import Callable
from functools import partial
from typing import Any

from augmentation import crop_and_flip
from datasets import Dataset, IterableDataset

from hf_r2.evaluation.data import to_pixels

SHUFFLE_BUFFER = 10_000
"""Images, still encoded, that a stream is shuffled within."""


def take_examples(split: Dataset | IterableDataset, count: int) -> Dataset:
    """Take the first examples, at most this many, for random access."""
    if isinstance(split, IterableDataset):
        return Dataset.from_list(list(split.take(count)), features=split.features)
    return split.select(range(min(count, len(split))))


def transformed(
    split: Dataset | IterableDataset, transform: Callable[[dict[str, list]], dict[str, Any]], seed: int | None = None
) -> Dataset | IterableDataset:
    """Transform batches on access; with a seed, a stream is shuffled."""
    if isinstance(split, Dataset):
        return split.with_transform(transform)
    if seed is not None:
        split = split.shuffle(seed, SHUFFLE_BUFFER)
    return split.map(transform, batched=True, batch_size=64, remove_columns=split.column_names)


def to_augmented_pixels(processor: Any, image_column: str, label_column: str) -> Callable[[dict[str, list]], Any]:
    """Make the transform of a training batch: a random crop at the processor's size, then its scaling."""
    augment = crop_and_flip(_input_size(processor))
    to_scaled = to_pixels(partial(processor, do_resize=False, do_center_crop=False), image_column, label_column)

    def transform(batch: dict[str, list]) -> dict[str, Any]:
        images = [augment(image.convert("RGB")) for image in batch[image_column]]
        return to_scaled({**batch, image_column: images})

    return transform


def _input_size(processor: Any) -> int:
    """Return the side of the square images that a processor makes, in pixels."""
    sizes = [size for size in (getattr(processor, "crop_size", None), processor.size) if size]
    side = next((size[key] for size in sizes for key in ("height", "shortest_edge") if size.get(key)), None)
    if side is None:
        raise ValueError(f"{type(processor).__name__} makes no square images to crop for: use augmentation none")
    return side
