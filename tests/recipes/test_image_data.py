import numpy as np
import pytest
from image_data import load_images, to_pixels
from PIL import Image
from sklearn.datasets import load_digits


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", "image", "label", "test", None)


def write_images(root, split):
    for shade, label in enumerate(("cat", "dog")):
        folder = root / split / label
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(folder / "one.png")


def test_digits_are_all_there_split_by_class(digits):
    assert len(digits["train"]) + len(digits["evaluation"]) == 1797
    shares = [np.bincount(digits[split]["label"]) / len(digits[split]) for split in ("train", "evaluation")]
    np.testing.assert_allclose(*shares, atol=2e-3)


def test_digits_images_are_the_data_sets_own(digits):
    original = {image.astype(int).tobytes() for image in load_digits().images}
    for image in digits["evaluation"][:20]["image"]:
        assert (np.asarray(image) / (255 / 16)).round().astype(int).tobytes() in original


def test_digits_split_is_the_same_every_time(digits):
    again = load_images("digits", "image", "label", "test", None)
    assert [split._fingerprint for split in again.values()] == [split._fingerprint for split in digits.values()]
    assert again["train"]["label"] == digits["train"]["label"]


def test_validation_split_comes_out_of_the_training_data(digits):
    held_out = load_images("digits", "image", "label", "validation_from_train", None)
    assert len(held_out["train"]) + len(held_out["evaluation"]) == len(digits["train"])
    test = {np.asarray(image).tobytes() for image in digits["evaluation"]["image"]}
    train = {np.asarray(image).tobytes() for image in digits["train"]["image"]}
    used = {np.asarray(image).tobytes() for split in held_out.values() for image in split["image"]}
    assert used == train
    assert len(used & test) == len(train & test)


def test_imagefolder_is_read_by_path(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "images", split)
    splits = load_images(str(tmp_path / "images"), "image", "label", "test", None)
    assert splits["train"].features["label"].names == ["cat", "dog"]
    assert len(splits["evaluation"]) == 2


@pytest.mark.parametrize(
    ("columns", "split", "message"),
    [
        (("image", "label"), "nowhere", "has no split 'nowhere'"),
        (("image", "label"), "tset", "it has"),
    ],
)
def test_unknown_split_names_the_ones_there_are(columns, split, message):
    with pytest.raises(ValueError, match=message):
        load_images("digits", *columns, split, None)


def test_missing_column_names_the_ones_there_are(tmp_path):
    write_images(tmp_path / "images", "train")
    with pytest.raises(ValueError, match=r"has no column 'picture'; it has \['image', 'label'\]"):
        load_images(str(tmp_path / "images"), "picture", "label", "train", None)


def test_transform_turns_gray_images_to_rgb_pixels(digits):
    def processor(images, return_tensors):
        return {"pixel_values": [image.mode for image in images]}

    batch = to_pixels(processor, "image", "label")(digits["train"][:2])
    assert batch["pixel_values"] == ["RGB", "RGB"]
    assert batch["labels"] == digits["train"][:2]["label"]
