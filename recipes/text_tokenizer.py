"""Small byte-level BPE tokenizers, trained on the training texts of a recipe."""

from collections.abc import Iterable

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

BYTES = 256
PAD, CLS, SEP, MASK = "[PAD]", "[CLS]", "[SEP]", "[MASK]"
END = "<|endoftext|>"


def classifier_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that reads texts, or pairs of them, as BERT does: `[CLS] … [SEP]` and `[CLS] … [SEP] … [SEP]`.

    Args:
        texts: the training split, and nothing else.
        vocab_size: tokens at most, with the 256 bytes and the special tokens `[PAD]`, `[CLS]`, `[SEP]` and `[MASK]`.
        max_length: tokens that the model takes.

    Raises:
        ValueError: for a vocabulary too small to hold the bytes, and without texts.
    """
    tokenizer = _byte_level_bpe(texts, vocab_size, [PAD, CLS, SEP, MASK])
    # The space before the mask belongs to it, as it does to every other word
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{CLS} $A {SEP}",
        pair=f"{CLS} $A {SEP} $B:1 {SEP}:1",
        special_tokens=[(token, tokenizer.token_to_id(token)) for token in (CLS, SEP)],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token=PAD,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=AddedToken(MASK, lstrip=True),
    )


def language_model_tokenizer(texts: Iterable[str], vocab_size: int, max_length: int) -> PreTrainedTokenizerFast:
    """Train a tokenizer that reads texts as GPT-2 does: as they are, with `<|endoftext|>` to put between them.

    Args:
        texts: the training split, and nothing else.
        vocab_size: tokens at most, with the 256 bytes and `<|endoftext|>`, which begins, ends and pads.
        max_length: tokens that the model takes.

    Raises:
        ValueError: for a vocabulary too small to hold the bytes, and without texts.
    """
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(texts, vocab_size, [END]),
        model_max_length=max_length,
        model_input_names=["input_ids", "attention_mask"],
        **dict.fromkeys(("bos_token", "eos_token", "pad_token"), END),
    )


def token_ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, int]:
    """Return the fields of a model's config that follow from its tokenizer."""
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    return {"vocab_size": len(tokenizer), **{name: index for name, index in ids.items() if index is not None}}


def _byte_level_bpe(texts: Iterable[str], vocab_size: int, special_tokens: list[str]) -> Tokenizer:
    if vocab_size < BYTES + len(special_tokens):
        raise ValueError(
            f"a vocabulary of {vocab_size} cannot hold the {BYTES} bytes and {len(special_tokens)} special tokens: "
            f"choose {BYTES + len(special_tokens)} or more"
        )
    texts = list(texts)
    if not any(texts):
        raise ValueError("there are no texts to train a tokenizer on")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special_tokens, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer
