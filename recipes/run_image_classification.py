"""Train an image classifier with range regularization, compress it, evaluate it and write its model card.

    accelerate launch recipes/run_image_classification.py recipes/vision/digits/r2_2bit.yaml [--key value …]

The output directory holds `float/` and `compressed/` checkpoints (and the same under `baseline/`, trained without R2
from the same seed); `compressed/README.md` is the card, and `compressed/manifest.json` what it is rendered from. A
model trained through its compression (`r2_aware`) has no float checkpoint; it is compared with the baseline's.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

from augmentation import AUGMENTATIONS, EpochCallback, MixupTrainer, make_augmentation
from experiment import ExperimentArguments, Task, class_options, data_facts, run
from image_data import AugmentedImages, input_size, on_access, stream_augmented, take_examples
from recipe_arguments import parse_recipe
from transformers import AutoModelForImageClassification, ConvNextImageProcessor, ViTImageProcessor

# The name at the top level needs torchvision in transformers 5.10
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_r2 import R2Trainer, R2TrainingArguments
from hf_r2.evaluation import LabelledData, evaluate_classifier
from hf_r2.evaluation.data import class_names, hub_revision, to_pixels


@dataclass
class ImageArguments(ExperimentArguments):
    """What the recipe does beside training."""

    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    streaming: bool = field(
        default=False, metadata={"help": "Read the data while training instead of before; needs max_steps."}
    )
    image_size: int = field(default=224, metadata={"help": "Height and width in pixels, for model_config."})
    crop_share: float = field(
        default=1.0, metadata={"help": "Share of an image's shorter side that is evaluated, cropped at the centre."}
    )
    augmentation: str = field(
        default="none",
        metadata={"help": "'crop_flip': random crops, which may be mirrored; 'trivial' (by torchvision); or 'none'."},
    )
    mixup: float = field(default=0.0, metadata={"help": "α of mixup; 0 mixes nothing."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.augmentation not in AUGMENTATIONS:
            raise ValueError(f"augmentation={self.augmentation!r} is not one of {', '.join(AUGMENTATIONS)}")
        if self.mixup < 0 or not 0 < self.crop_share <= 1:
            raise ValueError(f"mixup={self.mixup} is not ≥ 0, or crop_share={self.crop_share} not in (0, 1]")


def main() -> None:
    recipe, training, path = parse_recipe((ImageArguments, R2TrainingArguments))
    run(recipe, training, path, lambda recipe: make_task(recipe, training))


def make_task(recipe: ImageArguments, training: R2TrainingArguments) -> Task:
    if recipe.mixup and training.r2_teacher:
        raise ValueError(
            "mixed images have no class that a teacher's loss could count by: leave out mixup, or r2_teacher"
        )
    if recipe.streaming and training.max_steps < 1:
        raise ValueError("a data set that is streamed has no length: give max_steps")
    processor = make_processor(recipe)
    columns = recipe.image_column, recipe.label_column
    data = LabelledData(
        recipe.dataset,
        recipe.evaluate_on,
        columns[:1],
        columns[1],
        recipe.dataset_config,
        hub_revision(recipe.dataset),
    )
    train, evaluation = data.load_with_training(recipe.streaming)
    labels = class_names(train, recipe.label_column)
    to_inputs = to_pixels(processor, *columns)
    if recipe.augmentation == "none":
        training_images = on_access(train, to_inputs, training.seed)
    else:
        augment = make_augmentation(recipe.augmentation, input_size(processor))
        augmented = stream_augmented if recipe.streaming else AugmentedImages
        training_images = augmented(train, augment, processor, columns, training.seed)
    return Task(
        pipeline_tag="image-classification",
        auto_class=AutoModelForImageClassification,
        processor=processor,
        train=training_images,
        evaluation=on_access(evaluation, to_inputs),
        calibration=on_access(take_examples(train, recipe.calibration_examples), to_inputs),
        evaluate=evaluate_classifier,
        facts=data_facts(data, train, evaluation),
        config_options=class_options(labels),
        trainer_class=partial(MixupTrainer, recipe.mixup) if recipe.mixup else R2Trainer,
        callbacks=[EpochCallback(training_images)] if isinstance(training_images, AugmentedImages) else [],
    )


def make_processor(recipe: ImageArguments) -> Any:
    """Take the image processor of the start checkpoint, or one that resizes and scales to [−1, 1]."""
    if recipe.model_name is not None:
        return AutoImageProcessor.from_pretrained(recipe.model_name)
    scale = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    if recipe.crop_share < 1:
        return ConvNextImageProcessor(size={"shortest_edge": recipe.image_size}, crop_pct=recipe.crop_share, **scale)
    return ViTImageProcessor(size={"height": recipe.image_size, "width": recipe.image_size}, **scale)


if __name__ == "__main__":
    main()
