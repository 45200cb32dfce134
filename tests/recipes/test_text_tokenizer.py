import pytest
from hypothesis import given
from hypothesis import strategies as st
from text_tokenizer import classifier_tokenizer, language_model_tokenizer
from transformers import AutoTokenizer

TEXTS = ["self . assertEqual ( [ 1 ] , [MASK] )", "self . assertTrue ( first )", "return self . first"] * 5
KINDS = {"classifier": classifier_tokenizer, "language model": language_model_tokenizer}
every_kind = pytest.mark.parametrize("kind", sorted(KINDS))


@pytest.fixture(scope="module")
def tokenizers():
    return {kind: train(TEXTS, 300, 16) for kind, train in KINDS.items()}


@every_kind
def test_it_is_the_same_every_time_and_when_reloaded(tokenizers, tmp_path, kind):
    again = KINDS[kind](TEXTS, 300, 16)
    tokenizers[kind].save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    for other in (again, reloaded):
        assert other.get_vocab() == tokenizers[kind].get_vocab()
        assert other(TEXTS, truncation=True) == tokenizers[kind](TEXTS, truncation=True)
        assert other.special_tokens_map == tokenizers[kind].special_tokens_map
        assert other.model_max_length == 16


@every_kind
@given(text=st.text())
def test_every_text_can_be_read_back(tokenizers, kind, text):
    tokenizer = tokenizers[kind]
    if any(token in text for token in tokenizer.all_special_tokens):
        return
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text


@every_kind
def test_frequent_words_become_one_token(tokenizers, kind):
    assert len(tokenizers[kind].tokenize(" self")) == 1
    assert len(tokenizers[kind].tokenize(" qx")) > 1
    assert 260 < len(tokenizers[kind]) <= 300


def test_a_classifier_reads_as_bert_does(tokenizers):
    tokenizer = tokenizers["classifier"]
    single = tokenizer("first ( [MASK] )")
    words = tokenizer.convert_ids_to_tokens(single["input_ids"])
    assert (words[0], words[-1]) == ("[CLS]", "[SEP]")
    assert words.count("[MASK]") == 1
    assert words[words.index("[MASK]") - 1] == "Ġ("
    pair = tokenizer("first", "self")
    assert tokenizer.convert_ids_to_tokens(pair["input_ids"]).count("[SEP]") == 2
    assert sorted(set(pair["token_type_ids"])) == [0, 1]
    padded = tokenizer(["self", "self . first"], padding=True)
    assert padded["input_ids"][0][-1] == tokenizer.pad_token_id
    assert padded["attention_mask"][0][-1] == 0


def test_a_language_model_reads_as_gpt_2_does(tokenizers):
    tokenizer = tokenizers["language model"]
    assert sorted(tokenizer("self")) == ["attention_mask", "input_ids"]
    assert tokenizer.eos_token_id not in tokenizer("self . first")["input_ids"]
    assert tokenizer.bos_token == tokenizer.eos_token == tokenizer.pad_token == "<|endoftext|>"


@every_kind
def test_what_cannot_be_trained_says_why(kind):
    with pytest.raises(ValueError, match="a vocabulary of 256 cannot hold the 256 bytes"):
        KINDS[kind](TEXTS, 256, 16)
    with pytest.raises(ValueError, match="no texts"):
        KINDS[kind]([], 300, 16)
