"""Augmentation of training images: random crops that may be mirrored, TrivialAugment, and mixup.

What is drawn for an image depends on the seed, the epoch and the image's place in the data alone: not on the number of
processes and workers, nor on where an interrupted run was resumed.
"""

import math
import random
from collections.abc import Callable
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerState
from transformers.utils import is_torchvision_available

from hf_r2 import R2Trainer

AUGMENTATIONS = ("none", "crop_flip", "trivial")
AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)

Augment = Callable[[Image.Image, random.Random], Image.Image]


def make_augmentation(name: str, size: int) -> Augment:
    """Make what augments an RGB image, by draws from a generator, into one of `size` × `size` pixels.

    Args:
        name: `crop_flip` crops 8–100 % of an image (Szegedy et al., arXiv 1409.4842) and mirrors every second one;
            `trivial` takes one more step of TrivialAugment (Müller and Hutter, arXiv 2103.10158), by torchvision.
        size: in pixels.

    Raises:
        ValueError: for `trivial` without torchvision.
    """

    def crop_and_flip(image: Image.Image, draw: random.Random) -> Image.Image:
        box = random_box(image.width, image.height, draw)
        cropped = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        return cropped.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if draw.random() < 0.5 else cropped

    if name == "crop_flip":
        return crop_and_flip
    if not is_torchvision_available():
        raise ValueError("augmentation trivial is torchvision's: pip install torchvision, or use crop_flip")
    from torchvision.transforms.v2 import TrivialAugmentWide

    trivial = TrivialAugmentWide()

    def crop_flip_and_change(image: Image.Image, draw: random.Random) -> Image.Image:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(draw.getrandbits(63))
            return trivial(crop_and_flip(image, draw))

    return crop_flip_and_change


def random_box(width: int, height: int, draw: random.Random) -> tuple[int, int, int, int]:
    """Draw a box of random area and aspect ratio inside an image: left, upper, right, lower, in pixels."""
    for _ in range(10):
        area = width * height * draw.uniform(*AREA)
        ratio = math.exp(draw.uniform(*map(math.log, RATIO)))
        across, down = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < across <= width and 0 < down <= height:
            left, upper = draw.randint(0, width - across), draw.randint(0, height - down)
            return left, upper, left + across, upper + down
    side = min(width, height)
    left, upper = (width - side) // 2, (height - side) // 2
    return left, upper, left + side, upper + side


class EpochCallback(TrainerCallback):
    """Tells a data set which epoch begins."""

    def __init__(self, data: Any) -> None:
        self.data = data

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        """Set the epoch, counted from 0; a run that is resumed begins inside one."""
        self.data.set_epoch(math.floor(state.epoch or 0))


class MixupTrainer(R2Trainer):
    """Trains on batches of images mixed in pairs, with class probabilities as labels (arXiv 1710.09412).

    Every batch has one share λ ~ Beta(α, α): images are λ·x_i + (1 − λ)·x_j, labels the same mixture of both images'.

    Args:
        alpha: α > 0.
        **kwargs: see [`R2Trainer`]; label smoothing ε is heeded: a label keeps 1 − ε, and ε is spread over all classes.
    """

    def __init__(self, alpha: float, **kwargs: Any) -> None:
        super().__init__(**kwargs, compute_loss_func=soft_cross_entropy)
        self.beta = torch.distributions.Beta(alpha, alpha)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Tensor:
        """Mix the batch, and take the step."""
        pixels, classes = inputs["pixel_values"], self.model.config.num_labels
        smoothing = self.args.label_smoothing_factor
        labels = torch.nn.functional.one_hot(inputs["labels"], classes).float() * (1 - smoothing) + smoothing / classes
        share, order = self.beta.sample().item(), torch.randperm(len(pixels)).to(pixels.device)
        mixed = {name: torch.lerp(x[order], x, share) for name, x in {"pixel_values": pixels, "labels": labels}.items()}
        return super().training_step(model, {**inputs, **mixed}, *args, **kwargs)


def soft_cross_entropy(outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None) -> Tensor:
    """Cross-entropy against class probabilities `(batch, classes)`, as Trainer's `compute_loss_func`.

    Its sum is divided by the number of examples in the whole optimizer step, which Trainer counts.
    """
    losses = -(labels * outputs["logits"].float().log_softmax(dim=-1)).sum(dim=-1)
    return losses.mean() if num_items_in_batch is None else losses.sum() / num_items_in_batch
