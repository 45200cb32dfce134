"""Compress any float checkpoint as a recipe says, without its training: the optimum step alone.

    python recipes/quantize.py recipes/vision/digits/r2_2bit.yaml MODEL OUTPUT [--quantization.key value …]

MODEL is a directory or a name on the Hub. What calibrates takes its examples from the recipe's training data.
"""

from argparse import ArgumentParser
from pathlib import Path

from checkpoint_data import recipe_data
from recipe_arguments import apply_dotted, load_recipe

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.evaluation.checkpoint import calibration_batches
from hf_r2.report import render_card


def main() -> None:
    parser = ArgumentParser(description="Compress any float checkpoint as a recipe says.")
    parser.add_argument("recipe", type=Path, help="YAML file; its quantization and data are used")
    parser.add_argument("model", help="directory or Hub name of a float checkpoint")
    parser.add_argument("output", type=Path, help="directory of the compressed checkpoint")
    arguments, overrides = parser.parse_known_args()
    recipe = load_recipe(arguments.recipe, parser)
    recipe.setdefault("quantization", {})
    unknown = apply_dotted(recipe, overrides, parser)
    if unknown:
        parser.error(f"unknown option {unknown[0]!r}: overrides are --quantization.key value")
    try:
        config = R2QuantizationConfig(**recipe["quantization"])
        data = recipe_data(recipe, arguments.model, "train")
        count, batch_size = recipe.get("calibration_examples", 1024), recipe.get("per_device_eval_batch_size", 64)
        calibration = calibration_batches(arguments.model, data, count, batch_size)
        R2Quantizer.from_pretrained(arguments.model).quantize(arguments.output, config, calibration)
        render_card(arguments.output)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error with {arguments.model}: {error}") from error
    print(f"{arguments.output} holds the compressed checkpoint and its card")


if __name__ == "__main__":
    main()
