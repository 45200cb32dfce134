"""Image data sets of the recipes: the embedded digits, a folder of images, or any data set of the Hub."""

from datasets import ClassLabel, DatasetDict

from hf_r2.evaluation.data import VALIDATION_FROM_TRAIN, hold_out, load_splits, require_column, take_split, to_pixels

__all__ = ["load_images", "to_pixels"]


def load_images(
    name: str, image_column: str, label_column: str, evaluate_on: str, config: str | None, revision: str | None = None
) -> DatasetDict:
    """Load a data set as the splits `train` and `evaluation`.

    Args:
        name: `digits`, a directory laid out as an imagefolder, or a name on the Hub.
        image_column: column of the images.
        label_column: column of the class labels.
        evaluate_on: a split of the data set, or `validation_from_train`: a stratified fifth of the training data, held
            out with a fixed seed. Choose hyper-parameters there and leave the test split alone.
        config: configuration of a data set on the Hub.
        revision: commit of a data set on the Hub; the newest without.

    Raises:
        ValueError: for a missing split or column, or labels that are not classes.
    """
    splits = load_splits(name, config, revision)
    for column in (image_column, label_column):
        require_column(splits["train"], column, name)
    if not isinstance(splits["train"].features[label_column], ClassLabel):
        raise ValueError(f"column {label_column!r} of {name} does not hold class labels; cast it to ClassLabel")
    if evaluate_on == VALIDATION_FROM_TRAIN:
        parts = hold_out(splits["train"], label_column)
        return DatasetDict(train=parts["train"], evaluation=parts["test"])
    return DatasetDict(train=splits["train"], evaluation=take_split(splits, evaluate_on, label_column, name))
