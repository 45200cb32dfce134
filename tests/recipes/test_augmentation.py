import random

import numpy as np
import pytest
import torch
from augmentation import AREA, EpochCallback, MixupTrainer, make_augmentation, random_box, soft_cross_entropy
from datasets import ClassLabel, Dataset, Features, Image
from hypothesis import given
from hypothesis import strategies as st
from image_data import AugmentedImages, input_size, stream_augmented, take_examples, to_augmented_pixels
from PIL import Image as Pillow
from transformers import ConvNextImageProcessor, TrainerState, ViTConfig, ViTForImageClassification, ViTImageProcessor

from hf_r2 import R2TrainingArguments

COLUMNS = ("image", "label")


@pytest.fixture(scope="module")
def images():
    generator = np.random.default_rng(0)
    pictures = [Pillow.fromarray(generator.integers(256, size=(24, 20, 3), dtype=np.uint8)) for _ in range(10)]
    features = Features({"image": Image(), "label": ClassLabel(num_classes=4)})
    return Dataset.from_dict({"image": pictures, "label": [index % 4 for index in range(10)]}, features=features)


def augmented(images, seed=0):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    return AugmentedImages(images, make_augmentation("crop_flip", 8), processor, COLUMNS, seed)


@given(st.integers(1, 400), st.integers(1, 400), st.integers(0, 1000))
def test_boxes_lie_inside_the_image(width, height, seed):
    left, upper, right, lower = random_box(width, height, random.Random(seed))
    assert 0 <= left < right <= width
    assert 0 <= upper < lower <= height


def test_boxes_have_the_areas_and_ratios_that_are_drawn():
    draw = random.Random(0)
    boxes = [random_box(300, 200, draw) for _ in range(4000)]
    sides = np.array([(right - left, lower - upper) for left, upper, right, lower in boxes])
    shares = sides.prod(axis=1) / (300 * 200)
    ratios = sides[:, 0] / sides[:, 1]
    assert shares.min() == pytest.approx(AREA[0], abs=0.01)
    assert shares.max() <= 1
    # The log of the ratio is drawn evenly around 0; wide boxes fit a wide image more often
    assert ratios.min() > 3 / 4 * 0.95
    assert ratios.max() < 4 / 3 * 1.05


def test_images_are_cropped_resized_and_mirrored():
    draw = random.Random(0)
    image = Pillow.fromarray(np.tile(np.arange(64, dtype=np.uint8)[None, :, None] * 3, (48, 1, 3)))
    results = [np.asarray(make_augmentation("crop_flip", 32)(image, draw)).astype(int) for _ in range(200)]
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
    image = Pillow.new("L", (40, 30), 255)
    augment = make_augmentation("crop_flip", input_size(processor))
    transform = to_augmented_pixels(processor, COLUMNS, augment, seed=0)
    batch = transform({"image": [image, image], "label": [0, 1]}, [0, 1])
    assert batch["pixel_values"].shape == (2, 3, 16, 16)
    whole = processor(images=[image.convert("RGB")], return_tensors="pt")["pixel_values"]
    assert torch.equal(batch["pixel_values"][0], whole[0])
    assert batch["labels"] == [0, 1]


def test_draws_follow_seed_epoch_and_image_alone(images):
    data, again, other = augmented(images), augmented(images), augmented(images, seed=1)
    singly = [data[index]["pixel_values"] for index in reversed(range(10))][::-1]
    together = [example["pixel_values"] for example in again.__getitems__(range(10))]
    assert all(map(torch.equal, singly, together))
    data.set_epoch(1)
    for changed in (data, other):
        assert not any(torch.equal(changed[index]["pixel_values"], together[index]) for index in range(10))
    data.set_epoch(0)
    assert torch.equal(data[3]["pixel_values"], together[3])


@pytest.mark.parametrize(("progress", "epoch"), [(None, 0), (0.0, 0), (0.75, 0), (1.0, 1), (2.25, 2)])
def test_a_resumed_run_goes_on_in_its_epoch(images, progress, epoch):
    data = augmented(images)
    EpochCallback(data).on_epoch_begin(None, TrainerState(epoch=progress), None)
    assert data.epoch == epoch


def test_a_stream_is_augmented_the_same_every_time(images):
    processor = ViTImageProcessor(size={"height": 8, "width": 8})
    stream = stream_augmented(
        images.to_iterable_dataset(), make_augmentation("crop_flip", 8), processor, COLUMNS, seed=0
    )
    once, twice = list(stream), list(stream)
    assert sorted(example["labels"] for example in once) == sorted(images["label"])
    for one, other in zip(once, twice, strict=True):
        assert torch.equal(torch.as_tensor(one["pixel_values"]), torch.as_tensor(other["pixel_values"]))


def test_calibration_takes_the_first_images_of_a_stream(images):
    taken = take_examples(images.to_iterable_dataset(), 3)
    assert list(taken["label"]) == list(images["label"])[:3]
    assert np.array_equal(np.asarray(taken[1]["image"]), np.asarray(images[1]["image"]))
    assert len(take_examples(images, 100)) == 10


def test_trivial_augmentation_names_what_it_needs():
    try:
        import torchvision  # noqa: F401
    except ImportError:
        with pytest.raises(ValueError, match="pip install torchvision"):
            make_augmentation("trivial", 8)
    else:
        image = Pillow.new("RGB", (20, 20), (200, 10, 30))
        results = [make_augmentation("trivial", 8)(image, random.Random(seed)) for seed in (0, 0, 1)]
        assert results[0].size == (8, 8)
        assert np.array_equal(results[0], results[1])


class SeenBatches:
    """Notes the batches that a trainer's steps see."""

    def __init__(self, monkeypatch):
        from hf_r2 import R2Trainer

        self.batches = []
        monkeypatch.setattr(R2Trainer, "training_step", lambda trainer, model, inputs: self.batches.append(inputs))


def mixup_trainer(tmp_path, smoothing=0.0, alpha=1.0):
    config = ViTConfig(
        image_size=8, patch_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        num_labels=4,
    )  # fmt: skip
    arguments = R2TrainingArguments(
        str(tmp_path), label_smoothing_factor=smoothing, report_to="none", use_cpu=True, r2_mode="none"
    )
    return MixupTrainer(alpha, model=ViTForImageClassification(config), args=arguments)


def test_mixup_mixes_images_and_labels_alike(tmp_path, monkeypatch):
    trainer, seen = mixup_trainer(tmp_path), SeenBatches(monkeypatch)
    torch.manual_seed(0)
    pixels = torch.arange(4.0).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    trainer.training_step(trainer.model, {"pixel_values": pixels, "labels": torch.arange(4)})
    (batch,) = seen.batches
    assert torch.allclose(batch["labels"].sum(-1), torch.ones(4))
    # With images that are their own labels, the mixed image is the mean label
    assert torch.allclose(batch["pixel_values"][:, 0, 0, 0], batch["labels"] @ torch.arange(4.0))
    assert not torch.equal(batch["labels"], torch.eye(4))


def test_smoothing_is_that_of_cross_entropy(tmp_path, monkeypatch):
    trainer, seen = mixup_trainer(tmp_path, smoothing=0.1), SeenBatches(monkeypatch)
    trainer.beta = torch.distributions.Uniform(1 - 1e-7, 1.0)  # nothing is mixed
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), torch.randint(4, (6,))
    trainer.training_step(trainer.model, {"pixel_values": torch.zeros(6, 3, 8, 8), "labels": labels})
    ours = soft_cross_entropy({"logits": logits}, seen.batches[0]["labels"])
    theirs = torch.nn.functional.cross_entropy(logits, labels, label_smoothing=0.1)
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


def test_the_loss_of_mixed_labels_counts_examples_over_a_whole_step():
    torch.manual_seed(0)
    logits, labels = torch.randn(8, 5), torch.rand(8, 5)
    whole = soft_cross_entropy({"logits": logits}, labels)
    parts = [soft_cross_entropy({"logits": logits[part]}, labels[part], 8) for part in (slice(3), slice(3, 8))]
    assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-6)
