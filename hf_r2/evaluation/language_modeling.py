"""Evaluation of causal language models."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_r2.evaluation.figures import ClassFigures
from hf_r2.evaluation.metrics import Perplexity


@torch.no_grad()
def evaluate_language_model(
    model: PreTrainedModel,
    batches: Iterable[Mapping[str, Tensor]],
    description: str = "Evaluating",
    float_model: PreTrainedModel | None = None,
) -> dict[str, float | int | bool | None]:
    """Measure how well a causal language model predicts the next token.

    Args:
        model: language model whose output has logits `(batch, tokens, vocabulary)`.
        batches: model inputs with `labels`, the token ids `(batch, tokens)`; −100 is not counted, and neither is a
            sequence's first token, which nothing precedes.
        description: text of the progress bar.
        float_model: what the model was compressed from, to compare it with; on the same device.

    Returns:
        `perplexity`, and the figures of [`evaluate_classifier`] for tokens: the class is the next token, and `examples`
        counts predicted tokens.

    Raises:
        ValueError: if there are no batches.
    """
    model.eval()
    figures, perplexity = ClassFigures(), Perplexity()
    for batch in tqdm(batches, desc=description, unit="batch"):
        inputs = {key: value.to(model.device) for key, value in batch.items()}
        following = inputs.pop("labels")[:, 1:]
        counted = following != -100
        logits = model(**inputs).logits[:, :-1][counted]
        reference = None if float_model is None else float_model.eval()(**inputs).logits[:, :-1][counted]
        losses = figures.add_batch(logits, following[counted], reference)
        perplexity.add_batch(predictions=losses.tolist())
    return {**figures.compute(), **perplexity.compute()}
