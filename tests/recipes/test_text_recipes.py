"""The tasks of the text recipes, for the kinds of models they are for, without training."""

import json

import pytest
import run_language_modeling
import run_text_classification
import torch
from experiment import loader, make_model

from hf_r2 import R2QuantizationConfig, R2TrainingArguments

SMALL = {
    "bert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "distilbert": {"dim": 16, "n_layers": 1, "n_heads": 2, "hidden_dim": 16},
    "mobilebert": {
        "hidden_size": 16, "embedding_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
        "intermediate_size": 16, "intra_bottleneck_size": 8,
    },
    "modernbert": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16},
    "llama": {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16},
    "qwen3": {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
        "intermediate_size": 16,
    },
}  # fmt: skip
CLASSIFIERS, LANGUAGE_MODELS = ("bert", "distilbert", "mobilebert", "modernbert"), ("gpt2", "llama", "qwen3")


@pytest.fixture(scope="module")
def reviews(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reviews")
    for split, count in (("train", 12), ("test", 4)):
        rows = [
            {"text": f"number {index}", "more": "again and " * index, "opinion": ("good", "bad")[index % 2]}
            for index in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return str(folder)


@pytest.fixture
def arguments(tmp_path):
    return R2TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4)


def text_recipe(reviews, model_type, **options):
    config = {"model_type": model_type, **SMALL[model_type]}
    options = {"label_column": "opinion", "vocabulary": 300, **options}
    return run_text_classification.TextArguments("model", reviews, model_config=config, **options)


def language_recipe(reviews, model_type, **options):
    config = {"model_type": model_type, **SMALL[model_type]}
    options = {"vocabulary": 300, "context": 8, **options}
    return run_language_modeling.LanguageModelingArguments("model", reviews, model_config=config, **options)


@torch.no_grad()
@pytest.mark.parametrize("columns", [["text"], ["text", "more"]], ids=len)
@pytest.mark.parametrize("model_type", CLASSIFIERS)
def test_texts_and_pairs_reach_every_kind_of_classifier(reviews, arguments, model_type, columns):
    recipe = text_recipe(reviews, model_type, text_columns=columns)
    task = run_text_classification.make_task(recipe)
    model = make_model(recipe, task)
    assert model.config.id2label == {0: "bad", 1: "good"}
    assert model.config.vocab_size == len(task.processor)
    (batch,) = loader(task.evaluation, task, arguments)
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert model(**batch).logits.shape == (4, 2)
    figures = task.evaluate(model, loader(task.evaluation, task, arguments))
    assert figures["examples"] == 4


@torch.no_grad()
@pytest.mark.parametrize("model_type", LANGUAGE_MODELS)
def test_sequences_reach_every_kind_of_language_model(reviews, arguments, model_type):
    recipe = language_recipe(reviews, model_type)
    task = run_language_modeling.make_task(recipe)
    model = make_model(recipe, task)
    assert model.config.vocab_size == len(task.processor)
    batch = next(iter(loader(task.evaluation, task, arguments)))
    assert batch["input_ids"].shape[1] == 8
    assert torch.isfinite(model(**batch).loss)
    figures = task.evaluate(model, loader(task.evaluation, task, arguments))
    assert figures["perplexity"] > 1


def test_the_tokenizer_knows_the_training_texts_alone(reviews):
    tokenizer = run_text_classification.make_task(text_recipe(reviews, "bert", vocabulary=280)).processor
    assert len(tokenizer("number").input_ids) < len(tokenizer("zebras").input_ids)


def test_more_than_two_columns_of_text_are_refused(reviews):
    with pytest.raises(ValueError, match="neither one column nor two"):
        text_recipe(reviews, "bert", text_columns=["text", "more", "text"])


def test_a_missing_column_is_said_before_training(reviews):
    with pytest.raises(ValueError, match=r"has no column 'sentence'; it has \['text', 'more', 'opinion'\]"):
        run_text_classification.make_task(text_recipe(reviews, "bert", text_columns=["sentence"]))
    with pytest.raises(ValueError, match="has no column 'content'"):
        run_language_modeling.make_task(language_recipe(reviews, "gpt2", text_column="content"))


@pytest.mark.parametrize("model_type", [*CLASSIFIERS, *LANGUAGE_MODELS])
def test_embeddings_are_compressed_where_a_recipe_includes_them(reviews, tmp_path, model_type):
    from hf_r2 import encode, select_weights

    make = text_recipe if model_type in CLASSIFIERS else language_recipe
    script = run_text_classification if model_type in CLASSIFIERS else run_language_modeling
    recipe = make(reviews, model_type)
    model = make_model(recipe, script.make_task(recipe))
    config = R2QuantizationConfig(bits=4, include=["*"])
    selection = select_weights(model, config.include, config.skip, config.min_numel)
    embedding = model.get_input_embeddings()
    (name,) = (name for name, (module, _) in selection.items() if module is embedding)
    assert encode(embedding.weight, config, name).bits_per_weight < 16
