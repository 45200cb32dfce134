"""Train a causal language model, from scratch or further, with range regularization, compress it and write its card.

    accelerate launch recipes/run_language_modeling.py recipes/language/gpt2_sources/r2_2bit.yaml [--key value …]

Data: the embedded ones, a directory of text, json or parquet files, or any data set of the Hub. Texts are joined and
cut into sequences of `context` tokens. The output directory is laid out as run_image_classification.py's.
"""

from dataclasses import dataclass, field

from experiment import ExperimentArguments, Task, data_facts, run
from recipe_arguments import parse_recipe
from text_tokenizer import language_model_tokenizer, token_ids
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_r2 import R2TrainingArguments
from hf_r2.evaluation import LabelledData, evaluate_language_model
from hf_r2.evaluation.data import first_examples, hub_revision
from hf_r2.evaluation.sequences import pack


@dataclass
class LanguageModelingArguments(ExperimentArguments):
    """What the recipe does beside training."""

    text_column: str = field(default="text", metadata={"help": "Column of the texts."})
    context: int = field(default=1024, metadata={"help": "Tokens of a sequence."})
    vocabulary: int = field(
        default=4096,
        metadata={"help": "Tokens of the tokenizer, trained on the training texts, for model_config."},
    )


def main() -> None:
    recipe, training, path = parse_recipe((LanguageModelingArguments, R2TrainingArguments))
    run(recipe, training, path, make_task)


def make_task(recipe: LanguageModelingArguments) -> Task:
    data = LabelledData(
        recipe.dataset,
        recipe.evaluate_on,
        (recipe.text_column,),
        label=None,
        config=recipe.dataset_config,
        revision=hub_revision(recipe.dataset),
        context=recipe.context,
    )
    texts = data.load_with_training()
    if recipe.model_name is not None:
        tokenizer, options = AutoTokenizer.from_pretrained(recipe.model_name), {}
    else:
        tokenizer = language_model_tokenizer(texts[0][recipe.text_column], recipe.vocabulary, recipe.context)
        options = token_ids(tokenizer)
    train, evaluation = (pack(part, tokenizer, recipe.text_column, recipe.context) for part in texts)
    return Task(
        pipeline_tag="text-generation",
        auto_class=AutoModelForCausalLM,
        processor=tokenizer,
        train=train,
        evaluation=evaluation,
        calibration=first_examples(train, recipe.calibration_examples),
        evaluate=evaluate_language_model,
        facts=data_facts(data, train, evaluation),
        config_options=options,
    )


if __name__ == "__main__":
    main()
