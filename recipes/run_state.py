"""What an output directory holds of an earlier run, and whether this one may go on from there."""

import json
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from hf_r2 import R2TrainingArguments
from hf_r2.files import atomic_write
from hf_r2.report import Manifest

RUN_NAME = "run.json"
AFTER_TRAINING = {
    "name", "quantization", "calibration_examples", "reestimate_batch_norm", "evaluate_on", "floats_from",
}  # fmt: skip
RESULTS = ("baseline", "float", "compressed_as_trained", "compressed")
# What changes the results of a run, beside the recipe's own arguments and the r2_* ones
_TRAINING = (
    "adam_beta1", "adam_beta2", "adam_epsilon", "bf16", "fp16", "gradient_accumulation_steps", "label_smoothing_factor",
    "learning_rate", "lr_scheduler_kwargs", "lr_scheduler_type", "max_grad_norm", "max_steps", "num_train_epochs",
    "optim", "optim_args", "per_device_train_batch_size", "seed", "warmup_steps", "weight_decay",
)  # fmt: skip


def prepare_output(recipe: Any, training: R2TrainingArguments) -> None:
    """Make the output directory, or check the one that is there; the first process alone changes it.

    Raises:
        ValueError: for an earlier run that is neither to be replaced nor resumed, or that was of another recipe.
        OSError: if the directory cannot be written to.
        SystemExit: with status 0, for a run to be resumed that is finished.
    """
    output = Path(training.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=output):
        pass
    settings = _settings(recipe, training)
    found = [output / name for name in RESULTS if (output / name).exists()] + _checkpoints(output)
    if recipe.resume and found:
        _require_same_run(output, settings)
        if Manifest.load(output / "compressed").last("evaluate"):
            print(f"{output} holds the whole run already")
            raise SystemExit(0)
        return
    if found and not recipe.overwrite:
        raise ValueError(
            f"{output} holds an earlier run: add --resume true to go on with it, --overwrite true to replace it, or "
            "choose another --output_dir"
        )
    if training.process_index == 0:
        for path in found:
            shutil.rmtree(path)
        atomic_write(output / RUN_NAME, json.dumps(settings, indent=1, default=str) + "\n")


def last_whole_checkpoint(directory: Path, processes: int) -> str | None:
    """Return the newest checkpoint that was saved to its end; a kill while saving leaves one that was not."""
    for checkpoint in reversed(_checkpoints(directory)):
        try:
            TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))  # the first process saves it last
        except (OSError, ValueError, TypeError):
            continue
        states = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
        if all((checkpoint / name).is_file() for name in states):
            return str(checkpoint)
    return None


def _checkpoints(directory: Path) -> list[Path]:
    found = [path for path in directory.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.rpartition("-")[2].isdigit()]
    return sorted(found, key=lambda path: int(path.name.rpartition("-")[2]))


def _settings(recipe: Any, training: R2TrainingArguments) -> dict[str, Any]:
    arguments = training.to_dict()
    names = sorted({*_TRAINING, *(name for name in arguments if name.startswith("r2_"))})
    run = {name: value for name, value in asdict(recipe).items() if name not in ("overwrite", "resume")}
    return json.loads(json.dumps({**run, **{name: arguments[name] for name in names}}, default=str))


def require_same_training(earlier: Path, recipe: Any, training: R2TrainingArguments) -> None:
    """Check that the float models of an earlier run are those that this one would train.

    Raises:
        ValueError: if they are missing, or were trained otherwise.
    """
    settings = _settings(recipe, training)
    compared = settings.keys() - AFTER_TRAINING - {"with_baseline"}
    if training.r2_aware:  # then the baseline alone is taken
        compared -= {name for name in settings if name.startswith("r2_")}
    changed = sorted(name for name in compared if settings[name] != _noted(earlier).get(name))
    if changed:
        raise ValueError(f"the float models in {earlier} were trained with other values of {', '.join(changed)}")
    needed = [] if training.r2_aware else [earlier / "float"]
    needed += [earlier / "baseline" / "float"] if recipe.with_baseline else []
    for directory in needed:
        if not directory.is_dir():
            raise ValueError(f"{earlier} holds no {directory.relative_to(earlier)} to take: run its recipe first")


def _noted(output: Path) -> dict[str, Any]:
    path = output / RUN_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def _require_same_run(output: Path, settings: dict[str, Any]) -> None:
    earlier = _noted(output)
    changed = [name for name in settings if settings[name] != earlier.get(name)]
    if changed:
        raise ValueError(
            f"the run in {output} had other values of {', '.join(changed)} (see {output / RUN_NAME}): resume with the "
            "same, or choose another --output_dir"
        )
