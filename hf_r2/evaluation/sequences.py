"""Packed sequences of tokens, what causal language models are trained and measured on."""

from itertools import chain
from typing import Any

from datasets import Dataset, IterableDataset


def pack(texts: Dataset | IterableDataset, tokenizer: Any, text_column: str, context: int) -> Dataset | IterableDataset:
    """Tokenize texts, join them, and cut the tokens into sequences of one length, without padding.

    The end-of-text token stands behind every text. Texts are joined 1,000 at a time, and what is left at the end of
    that, less than a sequence, is dropped.

    Args:
        texts: documents.
        tokenizer: with an end-of-text token.
        text_column: column of the texts.
        context: tokens of a sequence.

    Returns:
        `input_ids` and `labels`, the same `(context,)` token ids.

    Raises:
        ValueError: for a tokenizer without an end-of-text token, a context below 2, and texts that do not fill one
            sequence.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(f"{type(tokenizer).__name__} has no end-of-text token (eos_token) to put between texts")
    if context < 2:
        raise ValueError(f"context={context}: a sequence has at least two tokens, one to predict from the other")

    def to_sequences(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        documents = tokenizer(batch[text_column], add_special_tokens=False, verbose=False)["input_ids"]
        tokens = list(chain.from_iterable([*document, tokenizer.eos_token_id] for document in documents))
        starts = range(0, len(tokens) - context + 1, context)
        sequences = [tokens[start : start + context] for start in starts]
        return {"input_ids": sequences, "labels": sequences}

    packed = texts.map(to_sequences, batched=True, remove_columns=texts.column_names)
    if isinstance(packed, Dataset) and not len(packed):
        raise ValueError(f"the texts do not fill one sequence of {context} tokens: lower the context")
    return packed
