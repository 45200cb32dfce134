"""Tokenizers of models that are trained from scratch: byte-level BPE, trained on the training texts."""

from collections.abc import Iterable
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

PAD, START, SEPARATOR, MASK, END = "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<|endoftext|>"


def classifier_tokenizer(texts: Iterable[str], vocabulary: int, max_tokens: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a classifier, which reads `[CLS] text [SEP]` or `[CLS] text [SEP] pair [SEP]`.

    Args:
        texts: what it is trained on.
        vocabulary: tokens, at least the 256 bytes and the special ones.
        max_tokens: longer texts are cut.

    Raises:
        ValueError: for a smaller vocabulary.
    """
    tokenizer = _byte_pairs(texts, vocabulary, [PAD, START, SEPARATOR, MASK])
    start, separator = (tokenizer.token_to_id(token) for token in (START, SEPARATOR))
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {SEPARATOR}",
        pair=f"{START} $A {SEPARATOR} $B:1 {SEPARATOR}:1",
        special_tokens=[(START, start), (SEPARATOR, separator)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        cls_token=START,
        sep_token=SEPARATOR,
        mask_token=MASK,
        model_max_length=max_tokens,
    )


def language_model_tokenizer(texts: Iterable[str], vocabulary: int, context: int) -> PreTrainedTokenizerFast:
    """Train the tokenizer of a language model, whose texts end with one special token; see [`classifier_tokenizer`]."""
    tokenizer = _byte_pairs(texts, vocabulary, [END])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END, model_max_length=context
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """Return the fields of a model's config that follow from its tokenizer."""
    names = ("pad_token_id", "bos_token_id", "eos_token_id")
    ids = {name: getattr(tokenizer, name) for name in names if getattr(tokenizer, name) is not None}
    return {"vocab_size": len(tokenizer), **ids}


def _byte_pairs(texts: Iterable[str], vocabulary: int, special: list[str]) -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocabulary < len(alphabet) + len(special):
        raise ValueError(f"vocabulary={vocabulary} is below {len(alphabet) + len(special)}: bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer
