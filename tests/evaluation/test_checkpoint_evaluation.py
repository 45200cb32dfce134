"""Evaluation of checkpoints, of images and of texts, on data by name."""

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedTokenizerFast,
    ResNetConfig,
    ResNetForImageClassification,
    ViTImageProcessor,
)

from hf_r2.evaluation import LabelledData, evaluate_checkpoint
from hf_r2.evaluation.data import to_pixels

WORDS = ["[PAD]", "[UNK]", "good", "bad", "film", "book"]


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images") / "digits"
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic")
    config.id2label = {index: str(index) for index in range(10)}
    ResNetForImageClassification(config).save_pretrained(folder)
    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts") / "reviews"
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[PAD]", model_max_length=16).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    features = Features({"first": Value("string"), "second": Value("string"), "label": Value("int64")})
    columns = {"first": ["good film", "bad", "good good book"], "second": ["film", "bad book", "x"], "label": [1, 0, 1]}
    DatasetDict(test=Dataset.from_dict(columns, features=features)).save_to_disk(tmp_path / "texts")
    return str(tmp_path / "texts")


@torch.no_grad()
def test_images_are_read_by_the_processor_and_counted_as_by_hand(classifier):
    data = LabelledData("digits")
    figures = evaluate_checkpoint(classifier, data)
    examples = data.load()
    pixels = to_pixels(ViTImageProcessor.from_pretrained(classifier), "image", "label")(examples[:])
    model = AutoModelForImageClassification.from_pretrained(classifier).eval()
    right = (model(pixels["pixel_values"]).logits.argmax(-1) == torch.tensor(examples["label"])).sum().item()
    assert figures["examples"] == 629
    assert figures["accuracy"] == pytest.approx(right / 629)


@torch.no_grad()
@pytest.mark.parametrize("columns", [("first",), ("first", "second")])
def test_texts_and_pairs_are_padded_and_counted_as_one_by_one(reader, texts, columns):
    figures = evaluate_checkpoint(reader, LabelledData(texts, "test", columns), batch_size=2)
    model = AutoModelForSequenceClassification.from_pretrained(reader).eval()
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reader)
    losses, right = [], 0
    for example in LabelledData(texts, "test", columns).load():
        logits = model(**tokenizer(*(example[column] for column in columns), return_tensors="pt")).logits
        losses.append(torch.nn.functional.cross_entropy(logits, torch.tensor([example["label"]])).item())
        right += int(logits.argmax(-1).item() == example["label"])
    assert figures["loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert figures["accuracy"] == pytest.approx(right / 3)


def test_a_checkpoint_is_as_close_to_itself_as_can_be(classifier):
    figures = evaluate_checkpoint(classifier, LabelledData("digits"), classifier)
    assert (figures["agreement"], figures["recovery"]) == (1.0, 1.0)


def test_what_cannot_be_evaluated_says_so(tmp_path, classifier, reader, texts):
    BertModel(BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2)).save_pretrained(
        tmp_path
    )
    with pytest.raises(ValueError, match="is a BertModel: what can be evaluated is image-classification"):
        evaluate_checkpoint(tmp_path, LabelledData("digits"))
    with pytest.raises(ValueError, match="has no column 'text'"):
        evaluate_checkpoint(reader, LabelledData(texts, "test", ("text",)))
    with pytest.raises(ValueError, match=r"has no split 'dev'; it has \['test'\]"):
        evaluate_checkpoint(reader, LabelledData(texts, "dev", ("first",)))
    with pytest.raises(ValueError, match="does not hold class indices"):
        scores = LabelledData(texts, "test", ("first",)).load().add_column("score", [0.5, 0.1, 0.2])
        DatasetDict(test=scores).save_to_disk(tmp_path / "scores")
        LabelledData(str(tmp_path / "scores"), "test", ("first",), "score").load()


def test_classes_in_another_order_are_refused(classifier, tmp_path):
    data = LabelledData("digits").load().cast_column("label", ClassLabel(names=[str(9 - index) for index in range(10)]))
    DatasetDict(test=data).save_to_disk(tmp_path / "turned")
    with pytest.raises(ValueError, match="the same in the same order"):
        evaluate_checkpoint(classifier, LabelledData(str(tmp_path / "turned")))


def test_data_are_found_again_by_what_the_manifest_notes(texts):
    digits = LabelledData("digits", "validation_from_train")
    assert LabelledData.from_facts(digits.facts()) == LabelledData("digits", "validation_from_train")
    hub = LabelledData("me/reviews", "dev", ("a", "b"), "c", "en", "c0ffee")
    assert hub.facts()["hub_name"] == "me/reviews"
    assert LabelledData.from_facts(hub.facts()) == hub
    local = LabelledData(texts, "test", ("first",)).facts()
    assert local["name"] == "texts"
    assert texts not in str(local)
    with pytest.raises(ValueError, match="'texts' is not on the Hub: say where it is with --data"):
        LabelledData.from_facts(local)
    assert LabelledData.from_facts(local, texts) == LabelledData(texts, "test", ("first",))
