"""The data of a recipe, as any checkpoint of its task reads them."""

import os
from typing import Any

from hf_r2.evaluation import LabelledData
from hf_r2.evaluation.checkpoint import as_seen_by, task_of
from hf_r2.evaluation.data import hub_revision


def recipe_data(recipe: dict[str, Any], model: str | os.PathLike[str], split: str) -> LabelledData:
    """Name the data of a recipe for a checkpoint.

    Args:
        recipe: its keys and values.
        model: directory or Hub name of the checkpoint.
        split: split of the data.

    Raises:
        ValueError: for a checkpoint of a task that no recipe trains.
    """
    images = task_of(model) == "image-classification"
    texts = recipe.get("text_columns") or [recipe.get("text_column", "text")]
    data = LabelledData(
        recipe["dataset"],
        split,
        (recipe.get("image_column", "image"),) if images else tuple(texts),
        recipe.get("label_column", "label"),
        recipe.get("dataset_config"),
        hub_revision(recipe["dataset"]),
        recipe.get("context"),
    )
    return as_seen_by(model, data)
