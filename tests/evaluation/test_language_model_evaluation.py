import json
import math

import pytest
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
from typer.testing import CliRunner

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.cli import app
from hf_r2.evaluation import LabelledData, evaluate_checkpoint, evaluate_language_model
from hf_r2.evaluation.sequences import pack

WORDS = ["<end>", "a", "b", "c", "d"]


@pytest.fixture(scope="module")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="<end>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<end>")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return GPT2LMHeadModel(GPT2Config(vocab_size=5, n_embd=8, n_layer=1, n_head=2, n_positions=6)).eval()


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, model, tokenizer):
    folder = tmp_path_factory.mktemp("model") / "gpt"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "words"
    folder.mkdir()
    rows = [{"text": "a b c d a b c d"}, {"text": "d c b a d"}, {"text": "a a"}]
    (folder / "test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


def test_texts_are_joined_and_cut_without_padding(tokenizer):
    packed = pack(Dataset.from_dict({"text": ["a b c", "d", "a b c d"]}), tokenizer, "text", 4)
    # a b c <end> | d <end> a b | c d <end>, of which the last is no whole sequence
    assert packed["input_ids"][:] == [[1, 2, 3, 0], [4, 0, 1, 2]]
    assert packed["labels"][:] == packed["input_ids"][:]
    assert packed.column_names == ["input_ids", "labels"]


def test_a_stream_of_texts_is_packed_as_it_comes(tokenizer):
    stream = Dataset.from_dict({"text": ["a b c", "d", "a b c d"]}).to_iterable_dataset()
    packed = pack(stream, tokenizer, "text", 4)
    assert isinstance(packed, IterableDataset)
    assert [sequence["input_ids"] for sequence in packed] == [[1, 2, 3, 0], [4, 0, 1, 2]]


def test_what_cannot_be_packed_says_so(tokenizer):
    data = Dataset.from_dict({"text": ["a b c"]})
    with pytest.raises(ValueError, match="do not fill one sequence of 8 tokens"):
        pack(data, tokenizer, "text", 8)
    with pytest.raises(ValueError, match="at least two tokens"):
        pack(data, tokenizer, "text", 1)
    without_end = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match="no end-of-text token"):
        pack(data, without_end, "text", 4)


@torch.no_grad()
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_language_model_is_measured_token_by_token(model, size):
    torch.manual_seed(1)
    ids = torch.randint(5, (3, 6))
    labels = ids.clone()
    labels[1, 3] = -100
    batches = [
        {"input_ids": ids[start : start + size], "labels": labels[start : start + size]} for start in range(0, 3, size)
    ]
    figures = evaluate_language_model(model, batches, float_model=model)
    losses, right = [], 0
    for row in range(3):
        for position in range(5):
            following = labels[row, position + 1].item()
            if following != -100:
                logits = model(ids[row : row + 1, : position + 1]).logits[0, -1].double()
                losses.append(-logits.log_softmax(-1)[following].item())
                right += int(logits.argmax().item() == following)
    assert figures["examples"] == len(losses) == 14
    assert figures["accuracy"] == pytest.approx(right / 14)
    assert figures["loss"] == pytest.approx(sum(losses) / 14, rel=1e-5)
    assert figures["perplexity"] == pytest.approx(math.exp(sum(losses) / 14), rel=1e-5)
    assert (figures["agreement"], figures["recovery"]) == (1.0, 1.0)


def test_a_checkpoint_is_measured_on_sequences_as_long_as_it_takes(checkpoint, texts):
    figures = evaluate_checkpoint(checkpoint, LabelledData(texts, "test", ("text",)))
    assert figures["examples"] == 3 * (6 - 1)  # with the ends there are 18 tokens, and the first of a sequence is given
    shorter = evaluate_checkpoint(checkpoint, LabelledData(texts, "test", ("text",), context=3))
    assert shorter["examples"] == 6 * (3 - 1)


def test_what_evaluate_records_verify_measures_again(checkpoint, texts, tmp_path):
    compressed = tmp_path / "gpt-4bit"
    R2Quantizer.from_pretrained(checkpoint).quantize(compressed, R2QuantizationConfig(bits=4))
    runner = CliRunner()
    arguments = ["evaluate", str(compressed), "--data", texts, "--context", "6", "--float", str(checkpoint), "--record"]
    assert runner.invoke(app, arguments).exit_code == 0
    card = (compressed / "README.md").read_text(encoding="utf-8")
    assert "at a perplexity of" in card
    verified = runner.invoke(app, ["verify", str(compressed), "--data", texts, "--float", str(checkpoint), "--json"])
    checks = {check["figure"]: check["result"] for check in json.loads(verified.stdout)}
    assert verified.exit_code == 0
    assert checks["perplexity"] == checks["card"] == "pass"
