"""Evaluation of classifiers."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_r2.evaluation.figures import ClassFigures


@torch.no_grad()
def evaluate_classifier(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    description: str = "Evaluating",
    float_model: PreTrainedModel | None = None,
) -> dict[str, float | int | bool | None]:
    """Measure a classifier on labelled batches.

    Args:
        model: classifier whose output has logits `(batch, classes)`.
        batches: model inputs with `labels`, class indices of shape `(batch,)`.
        description: text of the progress bar.
        float_model: what the model was compressed from, to compare it with; on the same device.

    Returns:
        `accuracy` (0–1), `loss` (mean cross-entropy in nats), `examples`, and `collapsed`: whether the accuracy is
        within two standard errors of always guessing the most frequent class. With a float model also `recovery`, the
        accuracy relative to its own, and what [`Fidelity`] computes.

    Raises:
        ValueError: if there are no batches.
    """
    model.eval()
    figures = ClassFigures()
    for batch in tqdm(batches, desc=description, unit="batch"):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        references = inputs.pop("labels")
        reference = None if float_model is None else float_model.eval()(**inputs).logits
        figures.add_batch(model(**inputs).logits, references, reference)
    return figures.compute()
