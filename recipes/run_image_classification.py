"""Train an image classifier with range regularization, compress it, evaluate it and write its model card.

    accelerate launch recipes/run_image_classification.py recipes/vision/digits/r2_2bit.yaml [--key value …]

The output directory holds `float/` and `compressed/` checkpoints (and the same under `baseline/`, trained without R2
from the same seed); `compressed/README.md` is the card, and `compressed/manifest.json` what it is rendered from. A
model trained through its compression (`r2_aware`) has no float checkpoint; it is compared with the baseline's.
"""

import copy
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from image_data import load_images, to_pixels
from recipe_arguments import parse_recipe
from torch.utils.data import DataLoader
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    ViTImageProcessor,
    default_data_collator,
    set_seed,
)

# The name at the top level needs torchvision in transformers 5.10
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from hf_r2 import R2QuantizationConfig, R2Quantizer, R2Trainer, R2TrainingArguments, weight_statistics
from hf_r2.evaluation import LabelledData, evaluate_classifier
from hf_r2.evaluation.data import hub_revision
from hf_r2.files import atomic_directory, weight_file_bytes
from hf_r2.refine import batch_norms, reestimate_batch_norm
from hf_r2.report import Manifest, render_card, result_table, weight_histograms

PICTURE_NAME = "weights.png"
AS_TRAINED = "compressed_as_trained"

logger = logging.getLogger(__name__)


@dataclass
class RecipeArguments:
    """What the recipe does beside training."""

    name: str = field(metadata={"help": "Name of the model, the title of its card."})
    dataset: str = field(metadata={"help": "'digits', a directory (imagefolder) or a name on the Hub."})
    quantization: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keys of R2QuantizationConfig; JSON on the command line."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    image_column: str = field(default="image", metadata={"help": "Column of the images."})
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    evaluate_on: str = field(
        default="test",
        metadata={"help": "Split to evaluate on; 'validation_from_train' holds out a fifth of the training data."},
    )
    model_name: str | None = field(default=None, metadata={"help": "Float checkpoint to start from; or model_config."})
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config of a model trained from scratch: model_type and its fields."}
    )
    image_size: int = field(default=224, metadata={"help": "Height and width in pixels, for model_config."})
    with_baseline: bool = field(default=False, metadata={"help": "First run the same recipe without R2."})
    reestimate_batch_norm: bool = field(
        default=True, metadata={"help": "Re-estimate batch-norm statistics after compression, without labels."}
    )
    calibration_examples: int = field(default=1024, metadata={"help": "Training images for that, at most."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier run."})

    def __post_init__(self) -> None:
        for name in ("quantization", "model_config"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        self.quantization = self.quantization or {}
        if (self.model_name is None) == (self.model_config is None):
            raise ValueError("name either model_name (a checkpoint to start from) or model_config (from scratch)")
        R2QuantizationConfig(**self.quantization)


@dataclass
class Data:
    """The two splits, as tensors on access, and facts for the manifest."""

    train: Dataset
    evaluation: Dataset
    labels: list[str]
    facts: dict[str, Any]


def main() -> None:
    recipe, training, path = parse_recipe((RecipeArguments, R2TrainingArguments))
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    output = Path(training.output_dir)
    if (output / "compressed").exists() and not recipe.overwrite:
        raise SystemExit(f"{output} holds an earlier run: add --overwrite true, or choose another --output_dir")
    training.remove_unused_columns = False
    processor = make_processor(recipe)
    data = make_data(recipe, processor)

    rows, models = [], {}
    arms = (
        [("baseline", output / "baseline"), (arm_name(training), output)]
        if recipe.with_baseline
        else [(arm_name(training), output)]
    )
    for arm, directory in arms:
        arguments = copy.deepcopy(training)
        arguments.output_dir = str(directory)
        if arm == "baseline":
            arguments.r2_mode = "none"
            arguments.r2_aware = arguments.r2_teacher = arguments.hub_model_id = None
        trainer = train(recipe, arguments, data, processor)
        if trainer.is_world_process_zero():
            if arguments.r2_aware:
                arm_rows, models[arm] = evaluate_aware(arm, recipe, trainer, data, rows)
            else:
                arm_rows, models[arm] = compress_and_evaluate(arm, recipe, arguments, data)
            rows += arm_rows
    trainer.accelerator.end_training()
    if not trainer.is_world_process_zero():
        return

    rows[-1]["published"] = True
    compressed = output / "compressed"
    weight_histograms(models, compressed / PICTURE_NAME, label=rows[-1]["weights"])
    manifest = Manifest.load(compressed)
    manifest.add(
        "evaluate",
        name=recipe.name,
        recipe={"path": str(path), "text": path.read_text(encoding="utf-8").strip()},
        data=data.facts,
        rows=rows,
        picture=PICTURE_NAME,
        model_class="AutoModelForImageClassification",
        pipeline_tag="image-classification",
        seconds=time.perf_counter() - start,
    )
    manifest.save(compressed)
    render_card(compressed)
    logger.info("\n%s\n", result_table([rows]))
    logger.info("Compressed checkpoint, model card and picture: %s", compressed)


def arm_name(training: R2TrainingArguments) -> str:
    parts = [] if training.r2_mode == "none" or training.r2_strength == 0 else ["R2"]
    parts += [training.r2_aware.replace("_", " ").replace("dkm", "DKM")] if training.r2_aware else []
    parts += ["distilled"] if training.r2_teacher else []
    return " + ".join(parts) or "baseline"


def make_processor(recipe: RecipeArguments) -> Any:
    """Take the image processor of the start checkpoint, or one that resizes and scales to [−1, 1]."""
    if recipe.model_name is not None:
        return AutoImageProcessor.from_pretrained(recipe.model_name)
    size = {"height": recipe.image_size, "width": recipe.image_size}
    return ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.5] * 3)


def make_data(recipe: RecipeArguments, processor: Any) -> Data:
    columns = recipe.image_column, recipe.label_column
    revision = hub_revision(recipe.dataset)
    evaluation = LabelledData(
        recipe.dataset, recipe.evaluate_on, columns[:1], columns[1], recipe.dataset_config, revision
    )
    splits = load_images(recipe.dataset, *columns, recipe.evaluate_on, recipe.dataset_config, revision)
    transform = to_pixels(processor, *columns)
    facts = {
        **evaluation.facts(),
        "train_examples": len(splits["train"]),
        "fingerprint": f"{splits['train']._fingerprint}-{splits['evaluation']._fingerprint}",
    }
    labels = splits["train"].features[recipe.label_column].names
    return Data(
        splits["train"].with_transform(transform), splits["evaluation"].with_transform(transform), labels, facts
    )


def train(recipe: RecipeArguments, arguments: R2TrainingArguments, data: Data, processor: Any) -> R2Trainer:
    """Train one arm and save its checkpoint, float or as compressed; every arm starts from the same seed."""
    set_seed(arguments.seed)
    trainer = R2Trainer(
        model=make_model(recipe, data.labels),
        args=arguments,
        train_dataset=data.train,
        data_collator=default_data_collator,
        processing_class=processor,
        quantization_config=R2QuantizationConfig(**recipe.quantization) if arguments.r2_aware else None,
    )
    trainer.train()
    if trainer.is_world_process_zero():
        with atomic_directory(Path(arguments.output_dir) / (AS_TRAINED if arguments.r2_aware else "float")) as scratch:
            trainer.save_model(str(scratch))
            (scratch / "training_args.bin").unlink(missing_ok=True)
    return trainer


def make_model(recipe: RecipeArguments, labels: list[str]) -> torch.nn.Module:
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    if recipe.model_name is not None:
        return AutoModelForImageClassification.from_pretrained(
            recipe.model_name, ignore_mismatched_sizes=True, num_labels=len(labels), **names
        )
    return AutoModelForImageClassification.from_config(AutoConfig.for_model(**recipe.model_config, **names))


def compress_and_evaluate(
    arm: str, recipe: RecipeArguments, arguments: R2TrainingArguments, data: Data
) -> tuple[list[dict[str, Any]], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Compress an arm's float checkpoint, and evaluate what a user would reload from disk.

    Returns:
        Result rows (float, compressed, compressed with batch norm re-estimated), and the float and compressed weights.
    """
    directory = Path(arguments.output_dir)
    quantizer = R2Quantizer.from_pretrained(directory / "float")
    config = R2QuantizationConfig(**recipe.quantization)
    batches = loader(data.evaluation, arguments)

    model = AutoModelForImageClassification.from_pretrained(directory / "float")
    statistics = weight_statistics(model, config.include, config.skip, config.min_numel)
    crest = sum(weight.crest_factor for weight in statistics) / len(statistics)
    floats = evaluate_classifier(model, batches, f"Evaluating {arm}, float")
    float_bytes = weight_file_bytes(directory / "float")

    def row(weights: str, batch_norm: str, metrics: dict[str, Any], size: int) -> dict[str, Any]:
        return result_row(arm, weights, batch_norm, metrics, crest, size, (floats["accuracy"], float_bytes))

    has_batch_norm = bool(batch_norms(model))
    as_trained = "as trained" if has_batch_norm else "none"
    rows = [row("float", as_trained, floats, float_bytes)]
    variants = [("compressed", as_trained, [])]
    if has_batch_norm and recipe.reestimate_batch_norm:
        variants = [(AS_TRAINED, as_trained, []), ("compressed", "re-estimated", ["batch_norm"])]
    calibration = calibration_data(recipe, data)
    for folder, batch_norm, refine in variants:
        steps = [step for step in recipe.quantization.get("refine", []) if step != "batch_norm"]
        config = R2QuantizationConfig(**{**recipe.quantization, "refine": [*steps, *refine]})
        quantizer.quantize(directory / folder, config, calibration, arguments.per_device_eval_batch_size)
        compressed = AutoModelForImageClassification.from_pretrained(directory / folder)
        description = f"Evaluating {arm}, {config.bits}-bit, {batch_norm}"
        metrics = evaluate_classifier(compressed, batches, description, float_model=model)
        rows.append(row(f"{config.bits}-bit", batch_norm, metrics, weight_file_bytes(directory / folder)))
    names = [weight.name for weight in statistics if config.settings_for(weight.name).bits == config.bits]
    weights = [[candidate.get_parameter(name) for name in names] for candidate in (model, compressed)]
    return rows, (weights[0], weights[1])


def evaluate_aware(
    arm: str, recipe: RecipeArguments, trainer: R2Trainer, data: Data, before: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Evaluate a model that was trained through its compression, as [`compress_and_evaluate`] does.

    Recovery and ratio refer to the first float row of the arms before it.
    """
    directory, arguments = Path(trainer.args.output_dir), trainer.args
    batches = loader(data.evaluation, arguments)
    facts = Manifest.load(directory / AS_TRAINED).last("quantize")
    crest = sum(weight["crest_factor"] for weight in facts["weights"]) / len(facts["weights"])
    floats = next((row for row in before if row["weights"] == "float"), None)
    reference = (floats["accuracy"], floats["bytes"]) if floats else (None, facts["bytes"]["float"])
    bits = facts["quantization_config"]["bits"]
    if batch_norms(trainer.model):
        folders = {AS_TRAINED: "as trained", "compressed": "re-estimated"}
        reestimate(directory / AS_TRAINED, directory / "compressed", loader(calibration_data(recipe, data), arguments))
    else:
        (directory / AS_TRAINED).rename(directory / "compressed")
        folders = {"compressed": "none"}
    rows = []
    for folder, batch_norm in folders.items():
        model = AutoModelForImageClassification.from_pretrained(directory / folder)
        metrics = evaluate_classifier(model, batches, f"Evaluating {arm}, {bits}-bit, {batch_norm}")
        size = weight_file_bytes(directory / folder)
        rows.append(result_row(arm, f"{bits}-bit", batch_norm, metrics, crest, size, reference))
    names = [weight["name"] for weight in facts["weights"] if weight["codec"]["bits"] == bits]
    latent = trainer.compression.floats.weights
    return rows, ([latent[name] for name in names], [model.get_parameter(name) for name in names])


def reestimate(source: Path, target: Path, batches: DataLoader) -> None:
    """Copy a compressed checkpoint with batch norm re-estimated."""
    model = AutoModelForImageClassification.from_pretrained(source)
    reestimate_batch_norm(model, ({"pixel_values": batch["pixel_values"]} for batch in batches))
    config = model.hf_quantizer.quantization_config
    config.refine = ["batch_norm"]
    manifest = Manifest.load(source)
    with atomic_directory(target) as scratch:
        model.save_pretrained(scratch)
        manifest.last("quantize")["quantization_config"] = config.to_dict()
        AutoImageProcessor.from_pretrained(source).save_pretrained(scratch)
        manifest.save(scratch)


def loader(split: Dataset, arguments: R2TrainingArguments) -> DataLoader:
    return DataLoader(split, batch_size=arguments.per_device_eval_batch_size, collate_fn=default_data_collator)


def calibration_data(recipe: RecipeArguments, data: Data) -> Dataset:
    return data.train.select(range(min(recipe.calibration_examples, len(data.train))))


def result_row(
    arm: str,
    weights: str,
    batch_norm: str,
    metrics: dict[str, Any],
    crest: float,
    size: int,
    reference: tuple[float | None, int],
) -> dict[str, Any]:
    """Lay out a row of the results table; the reference is accuracy and bytes of the float model."""
    accuracy, float_bytes = reference
    recovery = metrics["accuracy"] / accuracy if accuracy else None
    facts = {"recipe": arm, "weights": weights, "batch_norm": batch_norm, "crest_factor": crest}
    return {**facts, **metrics, "recovery": recovery, "bytes": size, "ratio": float_bytes / size}


if __name__ == "__main__":
    main()
