"""What every recipe does with its task: train, compress, evaluate what a user would reload, and write the card."""

import copy
import json
import logging
import shutil
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from run_state import last_whole_checkpoint, prepare_output, require_same_training
from torch.utils.data import DataLoader
from transformers import AutoConfig, TrainerCallback, default_data_collator, set_seed

from hf_r2 import R2QuantizationConfig, R2Quantizer, R2Trainer, R2TrainingArguments, weight_statistics
from hf_r2.evaluation import LabelledData
from hf_r2.files import atomic_directory, weight_file_bytes
from hf_r2.refine import batch_norms, reestimate_batch_norm
from hf_r2.report import Manifest, render_card, result_table, weight_histograms

PICTURE_NAME = "weights.png"
FLOAT = "float"
AS_TRAINED = "compressed_as_trained"
COMPRESSED = "compressed"
BASELINE = "baseline"

Panels = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Float weights and the same weights compressed, for the picture."""

logger = logging.getLogger(__name__)


@dataclass
class ExperimentArguments:
    """What a recipe does beside training."""

    name: str = field(metadata={"help": "Name of the model, the title of its card."})
    dataset: str = field(metadata={"help": "Embedded data by name, a directory, or a name on the Hub."})
    quantization: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Keys of R2QuantizationConfig; JSON on the command line."}
    )
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of a data set on the Hub."})
    evaluate_on: str = field(
        default="test",
        metadata={"help": "Split to evaluate on; 'validation_from_train' holds out a fifth of the training data."},
    )
    model_name: str | None = field(default=None, metadata={"help": "Float checkpoint to start from; or model_config."})
    model_config: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Config of a model trained from scratch: model_type and its fields."}
    )
    with_baseline: bool = field(default=False, metadata={"help": "First run the same recipe without R2."})
    reestimate_batch_norm: bool = field(
        default=True, metadata={"help": "Re-estimate batch-norm statistics after compression, without labels."}
    )
    calibration_examples: int = field(default=1024, metadata={"help": "Training examples for calibration, at most."})
    floats_from: str | None = field(
        default=None,
        metadata={"help": "Output directory of a run with the same training: its float checkpoints are taken."},
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace the results of an earlier run."})
    resume: bool = field(default=False, metadata={"help": "Go on with an interrupted run of the same recipe."})

    def __post_init__(self) -> None:
        for name in ("quantization", "model_config"):
            if isinstance(getattr(self, name), str):
                setattr(self, name, json.loads(getattr(self, name)))
        self.quantization = self.quantization or {}
        if (self.model_name is None) == (self.model_config is None):
            raise ValueError("name either model_name (a checkpoint to start from) or model_config (from scratch)")
        if self.overwrite and self.resume:
            raise ValueError("name either overwrite (start anew) or resume (go on)")
        R2QuantizationConfig(**self.quantization)


@dataclass
class Task:
    """What a recipe's script knows about its task.

    Args:
        pipeline_tag: the task in the Hub's words.
        auto_class: transformers' class that loads its models.
        processor: image processor or tokenizer, saved with the model.
        train: training examples.
        evaluation: what figures are measured on.
        calibration: training examples without augmentation, at random access.
        evaluate: measures a model on batches; see [`hf_r2.evaluation.evaluate_classifier`].
        facts: of the data, for the manifest.
        config_options: fields of the model's config that follow from the data.
        collate: makes a batch of examples.
        trainer_class: makes the trainer.
        callbacks: of the trainer.
    """

    pipeline_tag: str
    auto_class: Any
    processor: Any
    train: Any
    evaluation: Any
    calibration: Dataset
    evaluate: Callable[..., dict[str, Any]]
    facts: dict[str, Any]
    config_options: dict[str, Any]
    collate: Callable[[list[dict[str, Any]]], dict[str, Any]] = default_data_collator
    trainer_class: Callable[..., R2Trainer] = R2Trainer
    callbacks: list[TrainerCallback] = field(default_factory=list)


@dataclass
class Arm:
    """One training and what becomes of it: the recipe, or the same without R2.

    Args:
        name: what tables call it.
        arguments: of its training; its results go to their output directory.
    """

    name: str
    arguments: R2TrainingArguments

    @property
    def directory(self) -> Path:
        """Where its checkpoints go."""
        return Path(self.arguments.output_dir)


def run(
    recipe: ExperimentArguments,
    training: R2TrainingArguments,
    path: Path,
    make_task: Callable[[ExperimentArguments], Task],
) -> None:
    """Run an experiment: every process trains, then the first one compresses, evaluates and writes the card.

    Args:
        recipe: what to do.
        training: how to train.
        path: the recipe's file.
        make_task: loads data and processor; whatever is wrong with them is said before training starts.
    """
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.perf_counter()
    training.remove_unused_columns = False
    try:
        prepare_output(recipe, training)
        with training.main_process_first(desc="loading the data"):
            task = make_task(recipe)
        arms = make_arms(recipe, training)
        if recipe.floats_from is not None:
            require_same_training(Path(recipe.floats_from), recipe, training)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error
    trainers = [train(recipe, arm, task) for arm in arms]
    first = PartialState().is_main_process
    PartialState().destroy_process_group()
    if first:
        compress_and_report(recipe, path, task, list(zip(arms, trainers, strict=True)), start)


def data_facts(data: LabelledData, train: Any, evaluation: Any) -> dict[str, Any]:
    """Return what the manifest notes of the data; a stream has neither length nor fingerprint."""
    facts = data.facts()
    if isinstance(train, Dataset):
        facts["train_examples"] = len(train)
        facts["fingerprint"] = f"{train._fingerprint}-{evaluation._fingerprint}"
    return facts


def class_options(labels: list[str]) -> dict[str, Any]:
    """Return the fields of a classifier's config that name its classes."""
    names = {"id2label": dict(enumerate(labels)), "label2id": {label: index for index, label in enumerate(labels)}}
    return {"num_labels": len(labels), **names}


def make_arms(recipe: ExperimentArguments, training: R2TrainingArguments) -> list[Arm]:
    """List what to train: the recipe, and the baseline before it.

    Raises:
        ValueError: for a baseline that could not be compressed after training.
    """
    arms = [Arm(arm_name(training), training)]
    if recipe.with_baseline:
        inputs = R2QuantizationConfig(**recipe.quantization).activation_settings()
        if inputs is not None and inputs.learned:
            raise ValueError(
                f"inputs quantized by {inputs.method} are learned in training, so a baseline compressed after training "
                "has none: leave out with_baseline, and train the same recipe with r2_mode none beside it"
            )
        arguments = copy.deepcopy(training)
        arguments.output_dir = str(Path(training.output_dir) / BASELINE)
        arguments.r2_mode = "none"
        arguments.r2_aware = arguments.r2_teacher = arguments.hub_model_id = None
        arms.insert(0, Arm(BASELINE, arguments))
    return arms


def arm_name(training: R2TrainingArguments) -> str:
    parts = [] if training.r2_mode == "none" or training.r2_strength == 0 else ["R2"]
    parts += [training.r2_aware.replace("_", " ").replace("dkm", "DKM")] if training.r2_aware else []
    parts += ["distilled"] if training.r2_teacher else []
    return " + ".join(parts) or BASELINE


def train(recipe: ExperimentArguments, arm: Arm, task: Task) -> R2Trainer | None:
    """Train one arm and save its checkpoint, float or as compressed; every arm starts from the same seed.

    Returns:
        The trainer; None for an arm whose float checkpoint is there already.
    """
    arguments = arm.arguments
    if not arguments.r2_aware and find_float(recipe, arm):
        logger.info("%s is trained already: %s", arm.name, arm.directory / FLOAT)
        return None
    set_seed(arguments.seed)
    trainer = task.trainer_class(
        model=make_model(recipe, task),
        args=arguments,
        train_dataset=task.train,
        processing_class=task.processor,
        quantization_config=R2QuantizationConfig(**recipe.quantization) if arguments.r2_aware else None,
        data_collator=task.collate,
        callbacks=task.callbacks,
    )
    checkpoint = last_whole_checkpoint(arm.directory, arguments.world_size) if recipe.resume else None
    trainer.train(resume_from_checkpoint=checkpoint)
    target = arm.directory / (AS_TRAINED if arguments.r2_aware else FLOAT)
    # Every process may hold a part of the weights, but the first alone writes
    with atomic_directory(target) if trainer.is_world_process_zero() else nullcontext(target) as scratch:
        trainer.save_model(str(scratch))
        (scratch / "training_args.bin").unlink(missing_ok=True)
    return trainer


def find_float(recipe: ExperimentArguments, arm: Arm) -> bool:
    """Tell whether an arm's float checkpoint is there already, of an interrupted run or of another recipe's."""
    if recipe.floats_from is not None:
        source = Path(recipe.floats_from) / (BASELINE if arm.name == BASELINE else "") / FLOAT
        if PartialState().is_main_process:
            with atomic_directory(arm.directory / FLOAT) as scratch:
                shutil.copytree(source, scratch, dirs_exist_ok=True)
        return True
    return recipe.resume and (arm.directory / FLOAT).is_dir()


def make_model(recipe: ExperimentArguments, task: Task) -> torch.nn.Module:
    options = task.config_options
    if recipe.model_name is not None:
        return task.auto_class.from_pretrained(
            recipe.model_name, ignore_mismatched_sizes="id2label" in options, **options
        )
    return task.auto_class.from_config(AutoConfig.for_model(**{**options, **recipe.model_config}))


def compress_and_report(
    recipe: ExperimentArguments, path: Path, task: Task, arms: list[tuple[Arm, R2Trainer | None]], start: float
) -> None:
    """Compress and evaluate every arm, and write manifest, picture and card of the last one."""
    rows: list[dict[str, Any]] = []
    panels: dict[str, Panels] = {}
    for arm, trainer in arms:
        if arm.arguments.r2_aware:
            arm_rows, panels[arm.name] = evaluate_aware(arm, recipe, trainer, task, rows)
        else:
            arm_rows, panels[arm.name] = compress_and_evaluate(arm, recipe, task)
        rows += arm_rows
    rows[-1]["published"] = True
    compressed = arms[-1][0].directory / COMPRESSED
    weight_histograms(panels, compressed / PICTURE_NAME, label=rows[-1]["weights"])
    manifest = Manifest.load(compressed)
    manifest.add(
        "evaluate",
        name=recipe.name,
        recipe={"path": str(path), "text": path.read_text(encoding="utf-8").strip()},
        data=task.facts,
        rows=rows,
        picture=PICTURE_NAME,
        model_class=task.auto_class.__name__,
        pipeline_tag=task.pipeline_tag,
        seconds=time.perf_counter() - start,
    )
    manifest.save(compressed)
    render_card(compressed)
    logger.info("\n%s\n", result_table([rows]))
    logger.info("Compressed checkpoint, model card and picture: %s", compressed)


def compress_and_evaluate(arm: Arm, recipe: ExperimentArguments, task: Task) -> tuple[list[dict[str, Any]], Panels]:
    """Compress an arm's float checkpoint, and evaluate what a user would reload from disk.

    Returns:
        Result rows (float, compressed, compressed with batch norm re-estimated), and the float and compressed weights.
    """
    quantizer = R2Quantizer.from_pretrained(arm.directory / FLOAT)
    config = R2QuantizationConfig(**recipe.quantization)
    batches = loader(task.evaluation, task, arm.arguments)

    model = load(arm.directory / FLOAT, task, arm.arguments)
    statistics = weight_statistics(model, config.include, config.skip, config.min_numel)
    crest = sum(weight.crest_factor for weight in statistics) / len(statistics)
    floats = task.evaluate(model, batches, f"Evaluating {arm.name}, float")
    float_bytes = weight_file_bytes(arm.directory / FLOAT)

    def row(weights: str, batch_norm: str, metrics: dict[str, Any], size: int) -> dict[str, Any]:
        return result_row(arm.name, weights, batch_norm, metrics, crest, size, (floats["accuracy"], float_bytes))

    has_batch_norm = bool(batch_norms(model))
    as_trained = "as trained" if has_batch_norm else "none"
    rows = [row("float", as_trained, floats, float_bytes)]
    variants = [(COMPRESSED, as_trained, [])]
    if has_batch_norm and recipe.reestimate_batch_norm:
        variants = [(AS_TRAINED, as_trained, []), (COMPRESSED, "re-estimated", ["batch_norm"])]
    # Padded batches cannot be made of single examples by the quantizer itself
    collated = task.collate is not default_data_collator
    calibration = loader(task.calibration, task, arm.arguments) if collated else task.calibration
    for folder, batch_norm, refine in variants:
        steps = [step for step in recipe.quantization.get("refine", []) if step != "batch_norm"]
        config = R2QuantizationConfig(**{**recipe.quantization, "refine": [*steps, *refine]})
        quantizer.quantize(arm.directory / folder, config, calibration, arm.arguments.per_device_eval_batch_size)
        compressed = load(arm.directory / folder, task, arm.arguments)
        description = f"Evaluating {arm.name}, {config.bits}-bit, {batch_norm}"
        metrics = task.evaluate(compressed, batches, description, float_model=model)
        rows.append(row(f"{config.bits}-bit", batch_norm, metrics, weight_file_bytes(arm.directory / folder)))
    names = [weight.name for weight in statistics if config.settings_for(weight.name).bits == config.bits]
    weights = [[candidate.get_parameter(name) for name in names] for candidate in (model, compressed)]
    return rows, (weights[0], weights[1])


def evaluate_aware(
    arm: Arm, recipe: ExperimentArguments, trainer: R2Trainer, task: Task, before: list[dict[str, Any]]
) -> tuple[list[dict[str, Any]], Panels]:
    """Evaluate a model that was trained through its compression, as [`compress_and_evaluate`] does.

    Recovery and ratio refer to the first float row of the arms before it.
    """
    directory, batches = arm.directory, loader(task.evaluation, task, arm.arguments)
    facts = Manifest.load(directory / AS_TRAINED).last("quantize")
    crest = sum(weight["crest_factor"] for weight in facts["weights"]) / len(facts["weights"])
    floats = next((row for row in before if row["weights"] == "float"), None)
    reference = (floats["accuracy"], floats["bytes"]) if floats else (None, facts["bytes"]["float"])
    bits = facts["quantization_config"]["bits"]
    if batch_norms(trainer.model):
        folders = {AS_TRAINED: "as trained", COMPRESSED: "re-estimated"}
        reestimate(directory, task, loader(task.calibration, task, arm.arguments))
    else:
        shutil.rmtree(directory / COMPRESSED, ignore_errors=True)  # of an interrupted run
        (directory / AS_TRAINED).rename(directory / COMPRESSED)
        folders = {COMPRESSED: "none"}
    rows = []
    for folder, batch_norm in folders.items():
        model = load(directory / folder, task, arm.arguments)
        metrics = task.evaluate(model, batches, f"Evaluating {arm.name}, {bits}-bit, {batch_norm}")
        size = weight_file_bytes(directory / folder)
        rows.append(result_row(arm.name, f"{bits}-bit", batch_norm, metrics, crest, size, reference))
    names = [weight["name"] for weight in facts["weights"] if weight["codec"]["bits"] == bits]
    latent = trainer.compression.floats.weights
    return rows, ([latent[name] for name in names], [model.get_parameter(name) for name in names])


def reestimate(directory: Path, task: Task, batches: DataLoader) -> None:
    """Copy the compressed checkpoint with batch norm re-estimated."""
    model = task.auto_class.from_pretrained(directory / AS_TRAINED)
    reestimate_batch_norm(model, ({"pixel_values": batch["pixel_values"]} for batch in batches))
    config = model.hf_quantizer.quantization_config
    config.refine = ["batch_norm"]
    manifest = Manifest.load(directory / AS_TRAINED)
    with atomic_directory(directory / COMPRESSED) as scratch:
        model.save_pretrained(scratch)
        manifest.last("quantize")["quantization_config"] = config.to_dict()
        task.processor.save_pretrained(scratch)
        manifest.save(scratch)


def load(directory: Path, task: Task, arguments: R2TrainingArguments) -> torch.nn.Module:
    return task.auto_class.from_pretrained(directory).to(arguments.device)


def loader(split: Any, task: Task, arguments: R2TrainingArguments) -> DataLoader:
    return DataLoader(
        split,
        batch_size=arguments.per_device_eval_batch_size,
        collate_fn=task.collate,
        num_workers=arguments.dataloader_num_workers,
    )


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
