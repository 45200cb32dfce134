"""Train a classifier of texts, or of pairs of texts, with range regularization, compress it and write its model card.

    accelerate launch recipes/run_text_classification.py recipes/language/bert_brackets/r2_2bit.yaml [--key value …]

Data: the embedded ones, a directory of csv, json or parquet files (train.csv, test.csv), or any data set of the Hub,
such as the tasks of GLUE. The output directory is laid out as run_image_classification.py's.
"""

from dataclasses import dataclass, field

from experiment import ExperimentArguments, Task, class_options, data_facts, run
from recipe_arguments import parse_recipe
from text_tokenizer import classifier_tokenizer, token_ids
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

from hf_r2 import R2TrainingArguments
from hf_r2.evaluation import LabelledData, evaluate_classifier
from hf_r2.evaluation.data import class_names, first_examples, hub_revision, to_tokens


@dataclass
class TextArguments(ExperimentArguments):
    """What the recipe does beside training."""

    text_columns: list[str] = field(
        default_factory=lambda: ["text"], metadata={"help": "Column of the texts, or the two columns of a pair."}
    )
    label_column: str = field(default="label", metadata={"help": "Column of the class labels."})
    vocabulary: int = field(
        default=1024,
        metadata={"help": "Tokens of the tokenizer, trained on the training texts, for model_config."},
    )
    max_tokens: int = field(default=128, metadata={"help": "Longer texts are cut, for model_config."})

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.text_columns) not in (1, 2):
            raise ValueError(f"text_columns={self.text_columns} is neither one column nor two")


def main() -> None:
    recipe, training, path = parse_recipe((TextArguments, R2TrainingArguments))
    run(recipe, training, path, make_task)


def make_task(recipe: TextArguments) -> Task:
    data = LabelledData(
        recipe.dataset,
        recipe.evaluate_on,
        tuple(recipe.text_columns),
        recipe.label_column,
        recipe.dataset_config,
        hub_revision(recipe.dataset),
    )
    train, evaluation = data.load_with_training()
    if recipe.model_name is not None:
        tokenizer, options = AutoTokenizer.from_pretrained(recipe.model_name), {}
    else:
        texts = (text for column in recipe.text_columns for text in train[column])
        tokenizer = classifier_tokenizer(texts, recipe.vocabulary, recipe.max_tokens)
        options = token_ids(tokenizer)
    transform = to_tokens(tokenizer, recipe.text_columns, recipe.label_column)
    tokens, evaluated = (
        part.map(transform, batched=True, remove_columns=part.column_names) for part in (train, evaluation)
    )
    return Task(
        pipeline_tag="text-classification",
        auto_class=AutoModelForSequenceClassification,
        processor=tokenizer,
        train=tokens,
        evaluation=evaluated,
        calibration=first_examples(tokens, recipe.calibration_examples),
        evaluate=evaluate_classifier,
        facts=data_facts(data, train, evaluation),
        config_options={**options, **class_options(class_names(train, recipe.label_column))},
        collate=DataCollatorWithPadding(tokenizer),
    )


if __name__ == "__main__":
    main()
