import numpy as np
import pytest
from datasets import ClassLabel, IterableDataset
from PIL import Image
from sklearn.datasets import load_digits

from hf_r2.evaluation import LabelledData
from hf_r2.evaluation.data import VALIDATION_FROM_TRAIN, class_names, to_pixels


@pytest.fixture(scope="module")
def digits():
    return LabelledData("digits").load_with_training()


def write_images(root, split):
    for shade, label in enumerate(("cat", "dog")):
        folder = root / split / label
        folder.mkdir(parents=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(folder / "one.png")


def write_csv(folder, **splits):
    folder.mkdir()
    for split, labels in splits.items():
        lines = ["text,label", *(f"text {index},{label}" for index, label in enumerate(labels))]
        (folder / f"{split}.csv").write_text("\n".join(lines) + "\n")
    return str(folder)


def test_digits_are_all_there_split_by_class(digits):
    assert sum(map(len, digits)) == 1797
    shares = [np.bincount(split["label"]) / len(split) for split in digits]
    np.testing.assert_allclose(*shares, atol=2e-3)


def test_digits_images_are_the_data_sets_own(digits):
    original = {image.astype(int).tobytes() for image in load_digits().images}
    for image in digits[1][:20]["image"]:
        assert (np.asarray(image) / (255 / 16)).round().astype(int).tobytes() in original


def test_digits_split_is_the_same_every_time(digits):
    again = LabelledData("digits").load_with_training()
    assert [split._fingerprint for split in again] == [split._fingerprint for split in digits]
    assert again[0]["label"] == digits[0]["label"]


def test_what_is_evaluated_is_what_training_leaves(digits):
    assert LabelledData("digits").load()._fingerprint == digits[1]._fingerprint
    train, held_out = LabelledData("digits", VALIDATION_FROM_TRAIN).load_with_training()
    assert LabelledData("digits", VALIDATION_FROM_TRAIN).load()["label"] == held_out["label"]
    assert len(train) + len(held_out) == len(digits[0])


def test_validation_split_comes_out_of_the_training_data(digits):
    parts = LabelledData("digits", VALIDATION_FROM_TRAIN).load_with_training()
    test = {np.asarray(image).tobytes() for image in digits[1]["image"]}
    train = {np.asarray(image).tobytes() for image in digits[0]["image"]}
    used = {np.asarray(image).tobytes() for split in parts for image in split["image"]}
    assert used == train
    assert len(used & test) == len(train & test)


def test_imagefolder_is_read_by_path(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "images", split)
    train, evaluation = LabelledData(str(tmp_path / "images")).load_with_training()
    assert class_names(train, "label") == ["cat", "dog"]
    assert len(evaluation) == 2


def test_imagefolder_is_streamed_as_it_is_read(tmp_path):
    for split in ("train", "test"):
        write_images(tmp_path / "images", split)
    data = LabelledData(str(tmp_path / "images"))
    for streamed, loaded in zip(data.load_with_training(streaming=True), data.load_with_training(), strict=True):
        assert isinstance(streamed, IterableDataset)
        assert class_names(streamed, "label") == class_names(loaded, "label")
        for one, other in zip(streamed, loaded, strict=True):
            assert one["label"] == other["label"]
            assert np.array_equal(one["image"], other["image"])


@pytest.mark.parametrize("split", ["nowhere", "tset"])
def test_unknown_split_names_the_ones_there_are(split):
    with pytest.raises(ValueError, match=rf"has no split '{split}'; it has \['train', 'test'\]"):
        LabelledData("digits", split).load_with_training()


def test_missing_column_names_the_ones_there_are(tmp_path):
    write_images(tmp_path / "images", "train")
    with pytest.raises(ValueError, match=r"has no column 'picture'; it has \['image', 'label'\]"):
        LabelledData(str(tmp_path / "images"), "train", ("picture",)).load_with_training()


def test_what_cannot_be_streamed_says_so(tmp_path, digits):
    with pytest.raises(ValueError, match="digits is not read from files"):
        LabelledData("digits").load_with_training(streaming=True)
    digits[0].save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="cannot be streamed"):
        LabelledData(str(tmp_path / "saved")).load_with_training(streaming=True)
    write_images(tmp_path / "images", "train")
    with pytest.raises(ValueError, match="nothing can be held out of a stream"):
        LabelledData(str(tmp_path / "images"), VALIDATION_FROM_TRAIN).load_with_training(streaming=True)


def test_without_a_training_split_there_is_nothing_to_train_on(tmp_path):
    folder = write_csv(tmp_path / "data", test=[0, 1])
    assert len(LabelledData(folder, inputs=("text",)).load()) == 2
    with pytest.raises(ValueError, match=r"has no split 'train' to train on; it has \['test'\]"):
        LabelledData(folder, inputs=("text",)).load_with_training()


def test_labels_that_are_names_become_classes_in_alphabetical_order_over_all_splits(tmp_path):
    folder = write_csv(tmp_path / "data", train=["pear", "apple", "pear"], test=["fig", "apple"])
    train, test = LabelledData(folder, inputs=("text",)).load_with_training()
    assert class_names(train, "label") == class_names(test, "label") == ["apple", "fig", "pear"]
    assert (list(train["label"]), list(test["label"])) == ([2, 0, 2], [1, 0])


def test_labels_that_are_numbers_stay_and_are_named_by_their_digits(tmp_path):
    folder = write_csv(tmp_path / "data", train=[2, 0], test=[1])
    train, test = LabelledData(folder, inputs=("text",)).load_with_training()
    assert not isinstance(test.features["label"], ClassLabel)
    assert class_names(train, "label") == ["0", "1", "2"]


def test_secret_labels_are_no_classes_to_evaluate_on(tmp_path):
    folder = write_csv(tmp_path / "data", train=[1, 0], test=[-1, -1])
    with pytest.raises(ValueError, match=r"labels of the test split of .* are kept secret \(−1\)"):
        LabelledData(folder, inputs=("text",)).load_with_training()


def test_labels_that_measure_are_refused(tmp_path):
    folder = write_csv(tmp_path / "data", train=[0.5, 1.5])
    with pytest.raises(ValueError, match="does not hold class indices"):
        LabelledData(folder, "train", ("text",)).load_with_training()


def test_texts_without_labels_are_held_out_too(tmp_path):
    folder = write_csv(tmp_path / "data", train=["a"] * 10)
    parts = LabelledData(folder, VALIDATION_FROM_TRAIN, ("text",), label=None).load_with_training()
    assert sorted(text for part in parts for text in part["text"]) == sorted(f"text {index}" for index in range(10))
    assert list(map(len, parts)) == [8, 2]


def test_a_manifest_finds_its_data_again(tmp_path):
    folder = write_csv(tmp_path / "data", train=["a", "b"], test=["a"])
    for data in (
        LabelledData(folder, "test", ("text",), label=None, context=8),
        LabelledData(folder, "train", ["text"], "label"),
    ):
        again = LabelledData.from_facts(data.facts(), folder)
        assert (again.split, tuple(again.inputs), again.label, again.context) == (
            data.split,
            tuple(data.inputs),
            data.label,
            data.context,
        )


def test_transform_turns_gray_images_to_rgb_pixels(digits):
    def processor(images, return_tensors):
        return {"pixel_values": [image.mode for image in images]}

    batch = to_pixels(processor, "image", "label")(digits[0][:2])
    assert batch["pixel_values"] == ["RGB", "RGB"]
    assert batch["labels"] == digits[0][:2]["label"]
