import random

import numpy as np
import pytest
import torch
from augmentation import AREA, Mixup, crop_and_flip, random_box, soft_cross_entropy
from hypothesis import given
from hypothesis import strategies as st
from image_data import to_augmented_pixels
from PIL import Image
from transformers import ConvNextImageProcessor, ViTImageProcessor


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
def test_boxes_lie_inside_the_image(width, height, seed):
    random.seed(seed)
    left, upper, right, lower = random_box(width, height)
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_boxes_have_the_areas_and_ratios_that_are_drawn():
    random.seed(0)
    boxes = [random_box(300, 200) for _ in range(4000)]
    sides = np.array([(right - left, lower - upper) for left, upper, right, lower in boxes])
    shares = sides.prod(axis=1) / (300 * 200)
    ratios = sides[:, 0] / sides[:, 1]
    assert shares.min() == pytest.approx(AREA[0], abs=0.01)
    assert shares.max() <= 1
    # The log of the ratio is drawn evenly around 0; wide boxes fit a wide image more often
    assert ratios.min() > 3 / 4 * 0.95
    assert ratios.max() < 4 / 3 * 1.05


def test_images_are_cropped_resized_and_mirrored():
    random.seed(0)
    image = Image.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (48, 1, 3)))
    results = [np.asarray(crop_and_flip(32)(image)).astype(int) for _ in range(200)]
    assert {result.shape for result in results} == {(32, 32, 3)}
    rising = sum(result[0, -1, 0] > result[0, 0, 0] for result in results)
    assert 70 < rising < 130


@pytest.mark.parametrize(
    "processor",
    [
        ViTImageProcessor(size={"height": 16, "width": 16}),
        ConvNextImageProcessor(size={"shortest_edge": 16}, crop_pct=0.875),
    ],
    ids=["square", "cropped"],
)
def test_the_processor_scales_a_crop_but_does_not_cut_it_again(processor):
    image = Image.new("L", (40, 30), 255)
    batch = to_augmented_pixels(processor, "image", "label")({"image": [image, image], "label": [0, 1]})
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    whole = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][0], whole[0])
    assert batch["labels"] == [0, 1]


def test_mixup_mixes_images_and_labels_alike():
    torch.manual_seed(0)
    examples = [{"pixel_values": torch.full((3, 2, 2), float(label)), "labels": label} for label in range(4)]
    batch = Mixup(alpha=1.0, classes=4)(examples)
    assert torch.allclose(batch["labels"].sum(-1), torch.ones(4))
    # With images that are their own labels, the mixed image is the mean label
    assert torch.allclose(batch["pixel_values"][:, 0, 0, 0], batch["labels"] @ torch.arange(4.0))
    assert not torch.equal(batch["labels"], torch.eye(4))


def test_smoothing_is_that_of_cross_entropy():
    torch.manual_seed(0)
    logits = torch.randn(6, 5)
    labels = torch.randint(5, (6,))
    examples = [{"pixel_values": torch.zeros(1), "labels": int(label)} for label in labels]
    mixup = Mixup(alpha=1.0, classes=5, smoothing=0.1)
    mixup.beta = torch.distributions.Uniform(1 - 1e-7, 1.0)  # nothing is mixed
    ours = soft_cross_entropy({"logits": logits}, mixup(examples)["labels"])
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_loss_of_mixed_labels_counts_examples_over_a_whole_step():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.rand(8, 5)
    whole = soft_cross_entropy({"logits": logits}, labels)
    counted = labels.ne(-100).sum()  # as Trainer counts over all micro-batches of a step
    parts = [soft_cross_entropy({"logits": logits[part]}, labels[part], counted) for part in (slice(3), slice(3, 8))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
