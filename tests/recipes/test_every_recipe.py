"""What holds for every recipe, without running it."""

import difflib
import importlib
import re
from pathlib import Path

import pytest
from recipe_arguments import parse_recipe
from transformers import AutoConfig

from hf_r2 import R2QuantizationConfig, R2TrainingArguments

ROOT = Path(__file__).parents[2]
RECIPES = sorted(ROOT.glob("recipes/vision/*/*.yaml")) + sorted(ROOT.glob("recipes/language/*/*.yaml"))
ARGUMENTS = {
    "run_image_classification": "ImageArguments",
    "run_text_classification": "TextArguments",
    "run_language_modeling": "LanguageModelingArguments",
}
R2_KEYS = {"name", "hub_model_id", "output_dir", "with_baseline"}

every_recipe = pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")


def settings(path):
    """The lines of a recipe without its comments."""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]


@every_recipe
def test_recipe_is_understood_by_the_script_that_its_header_launches(path):
    header = path.read_text(encoding="utf-8").partition("\nname:")[0].replace("\\\n# ", "")
    script, recipe = re.search(r"accelerate launch .*?recipes/(run_\w+)\.py +(\S+)", header).groups()
    assert ROOT / recipe == path
    task_arguments = getattr(importlib.import_module(script), ARGUMENTS[script])
    parsed, training, _ = parse_recipe((task_arguments, R2TrainingArguments), [str(path), "--use_cpu", "true"])
    quantization = {**parsed.quantization, **({"aware": training.r2_aware} if training.r2_aware else {})}
    R2QuantizationConfig(**quantization)
    if parsed.model_config is not None:
        AutoConfig.for_model(**parsed.model_config)


@pytest.mark.parametrize("folder", sorted({path.parent for path in RECIPES}), ids=lambda folder: folder.name)
def test_every_model_has_a_baseline_and_a_recipe_that_differs_in_the_r2_lines_only(folder):
    baseline = settings(folder / "baseline.yaml")
    differing = []
    for recipe in sorted(folder.glob("r2_*.yaml")):
        changed = [line[2:] for line in difflib.ndiff(baseline, settings(recipe)) if line[:2] in ("- ", "+ ")]
        keys = {line.partition(":")[0] for line in changed if line.strip()}
        differing.append({key for key in keys if not key.startswith("r2_")} - R2_KEYS)
    assert set() in differing


@every_recipe
def test_names_and_output_directories_are_a_recipes_own(path):
    for key in ("name", "output_dir"):
        own = [line for line in settings(path) if line.startswith(f"{key}:")]
        assert len(own) == 1
        assert [other for other in RECIPES if other != path and own[0] in settings(other)] == []
