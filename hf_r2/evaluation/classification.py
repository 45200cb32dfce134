"""Evaluation of classifiers."""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_r2.evaluation.fidelity import Fidelity
from hf_r2.evaluation.metrics import Accuracy


@torch.no_grad()
def evaluate_classifier(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    description: str = "Evaluating",
    float_model: PreTrainedModel | None = None,
) -> dict[str, float | int | bool]:
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
    metric = Accuracy()
    fidelity = None if float_model is None else Fidelity()
    labels, loss = [], 0.0
    for batch in tqdm(batches, desc=description, unit="batch"):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        references = inputs.pop("labels")
        logits = model(**inputs).logits.float()
        loss += torch.nn.functional.cross_entropy(logits, references, reduction="sum").item()
        metric.add_batch(predictions=logits.argmax(dim=-1).tolist(), references=references.tolist())
        labels.append(references.cpu())
        if fidelity is not None:
            fidelity.add_batch(logits, float_model.eval()(**inputs).logits, references)
    if not labels:
        raise ValueError("the evaluation data is empty")
    references = torch.cat(labels)
    accuracy = metric.compute()["accuracy"]
    chance = references.bincount().max().item() / len(references)
    standard_error = math.sqrt(chance * (1 - chance) / len(references))
    figures = {
        "accuracy": accuracy,
        "loss": loss / len(references),
        "examples": len(references),
        "collapsed": accuracy <= chance + 2 * standard_error,
    }
    if fidelity is not None:
        compared = fidelity.compute()
        recovery = accuracy / compared["float_accuracy"] if compared["float_accuracy"] else None
        figures |= {"recovery": recovery, **compared}
    return figures
