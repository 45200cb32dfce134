"""Augmentation of training images: a random crop that may be mirrored, and mixup."""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import default_data_collator
from transformers.utils import is_torchvision_available

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def crop_and_flip(size: int) -> Callable[[Image.Image], Image.Image]:
    """Crop 8–100 % of an image at random, resize it to `size` × `size` pixels, and mirror every second one.

    The crop of Szegedy et al., arXiv 1409.4842. torchvision does it where it is installed, Pillow without; both draw
    from the same distribution, but not the same crops.
    """
    if is_torchvision_available():
        from torchvision.transforms import v2

        return v2.Compose([v2.RandomResizedCrop(size, AREA, RATIO), v2.RandomHorizontalFlip()])

    def transform(image: Image.Image) -> Image.Image:
        cropped = image.resize((size, size), Image.Resampling.BILINEAR, box=random_box(image.width, image.height))
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < 0.5 else cropped

    return transform


def random_box(width: int, height: int) -> tuple[int, int, int, int]:
    """Draw a box of random area and aspect ratio inside an image: left, upper, right, lower, in pixels."""
    for _ in range(10):
        area = width * height * random.uniform(*AREA)
        ratio = math.exp(random.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = random.randint(0, width - across), random.randint(0, height - down)
            return left, upper, left + across, upper + down
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


class Mixup:
    """Makes batches of images mixed in pairs, with class probabilities as labels (arXiv 1710.09412).

    Every batch has one share λ ~ Beta(α, α): images are λ·x_i + (1 − λ)·x_j, labels the same mixture of both images'.

    Args:
        alpha: α > 0.
        classes: number of classes.
        smoothing: label smoothing ε: each label keeps 1 − ε, and ε is spread over all classes.
    """

    def __init__(self, alpha: float, classes: int, smoothing: float = 0.0) -> None:
        self.beta = torch.distributions.Beta(alpha, alpha)
        self.classes = classes
        self.smoothing = smoothing

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        """Make a batch of examples with `pixel_values` and `labels`, class indices."""
        batch = default_data_collator(examples)
        pixels, hot = batch["pixel_values"], torch.nn.functional.one_hot(batch["labels"], self.classes).float()
        labels = hot * (1 - self.smoothing) + self.smoothing / self.classes
        share, order = self.beta.sample(), torch.randperm(len(pixels))
        return {
            "pixel_values": torch.lerp(pixels[order], pixels, share),
            "labels": torch.lerp(labels[order], labels, share),
        }


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy against class probabilities `(batch, classes)`, as Trainer's `compute_loss_func`.

    Trainer counts the elements of the labels, here a number for every class of an example.
    """
    losses = -(labels * outputs["logits"].float().log_softmax(dim=-1)).sum(dim=-1)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch * labels.shape[-1]
