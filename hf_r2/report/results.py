"""Writing measured figures into the manifest and card of a compressed checkpoint."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hf_r2.evaluation import LabelledData
from hf_r2.evaluation.checkpoint import MODEL_CLASSES, task_of
from hf_r2.report.card import render_card
from hf_r2.report.manifest import Manifest


def require_compressed(directory: str | os.PathLike[str]) -> Manifest:
    """Return the manifest of a compressed checkpoint.

    Raises:
        ValueError: if the directory has none with a quantize stage.
    """
    manifest = Manifest.load(directory)
    if not manifest.last("quantize"):
        raise ValueError(f"{directory} has no manifest of a compressed checkpoint: make it with R2Quantizer.quantize")
    return manifest


def record_figures(
    directory: str | os.PathLike[str], data: LabelledData, figures: Mapping[str, Any], seconds: float
) -> None:
    """Note figures of a compressed checkpoint in its manifest, as those that its card publishes; render the card.

    Args:
        directory: compressed checkpoint.
        data: what it was measured on.
        figures: see [`hf_r2.evaluation.evaluate_checkpoint`].
        seconds: how long measuring took.

    Raises:
        ValueError: if the directory has no manifest with a quantize stage.
    """
    manifest = require_compressed(directory)
    quantize = manifest.last("quantize")
    weights, sizes = quantize["weights"], quantize["bytes"]
    task = task_of(directory)
    row = {
        "recipe": quantize["base_model"],
        "weights": f"{quantize['quantization_config']['bits']}-bit",
        "batch_norm": "as compressed",
        "crest_factor": sum(weight["crest_factor"] for weight in weights) / len(weights),
        "bytes": sizes["compressed"],
        "ratio": sizes["float"] / sizes["compressed"],
        "recovery": None,
        "published": True,
        **figures,
    }
    manifest.add(
        "evaluate",
        name=Path(directory).absolute().name,
        data=data.facts(),
        rows=[row],
        model_class=MODEL_CLASSES[task],
        pipeline_tag=task,
        seconds=seconds,
    )
    manifest.save(directory)
    render_card(directory)
