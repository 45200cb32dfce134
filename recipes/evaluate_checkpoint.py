"""Measure any checkpoint, float or compressed, on the data of a recipe.

    python recipes/evaluate_checkpoint.py recipes/vision/digits/r2_2bit.yaml MODEL [--float FLOAT_MODEL] [--record]

It prints the figures as JSON. With a float model they also say how close the checkpoint is to it; --record puts them
into manifest and card of a compressed checkpoint.
"""

import json
import time
from argparse import ArgumentParser
from pathlib import Path

from checkpoint_data import recipe_data
from recipe_arguments import load_recipe

from hf_r2.evaluation import evaluate_checkpoint
from hf_r2.report.results import record_figures, require_compressed


def main() -> None:
    parser = ArgumentParser(description="Measure any checkpoint on the data of a recipe.")
    parser.add_argument("recipe", type=Path, help="YAML file; its data are used")
    parser.add_argument("model", help="directory or Hub name of a checkpoint")
    parser.add_argument("--float", dest="float_model", help="float checkpoint to compare with")
    parser.add_argument("--split", help="another split than the recipe's evaluate_on")
    parser.add_argument("--record", action="store_true", help="put the figures into manifest and card")
    arguments = parser.parse_args()
    recipe = load_recipe(arguments.recipe, parser)
    start = time.perf_counter()
    try:
        if arguments.record:
            require_compressed(arguments.model)
        data = recipe_data(recipe, arguments.model, arguments.split or recipe.get("evaluate_on", "test"))
        batch_size = recipe.get("per_device_eval_batch_size", 64)
        figures = evaluate_checkpoint(arguments.model, data, arguments.float_model, batch_size)
        if arguments.record:
            record_figures(arguments.model, data, figures, time.perf_counter() - start)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error with {arguments.model}: {error}") from error
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
