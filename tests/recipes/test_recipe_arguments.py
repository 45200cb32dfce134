import json
import re
from dataclasses import dataclass, field
from typing import Any

import pytest
from recipe_arguments import parse_recipe

from hf_r2 import R2TrainingArguments


@dataclass
class Toy:
    name: str
    rate: float = 0.1
    flag: bool = False
    names: list[str] | None = None
    nested: dict[str, Any] | str | None = field(default=None)

    def __post_init__(self):
        if self.rate < 0:
            raise ValueError("rate is negative")


@pytest.fixture
def parse(tmp_path):
    def run(text, *options):
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return parse_recipe((Toy,), [str(path), *options])[0]

    return run


def test_yaml_values_take_the_types_of_their_fields(parse):
    toy = parse("name: a\nrate: 1e-3\nflag: true\nnames: [x, y]\nnested: {bits: 2}")
    assert (toy.rate, toy.flag, toy.names) == (1e-3, True, ["x", "y"])


def test_command_line_wins_over_yaml(parse):
    assert parse("name: a\nrate: 0.5", "--rate", "0.25").rate == 0.25


def test_null_keeps_the_default(parse):
    assert parse("name: a\nrate: null").rate == 0.1


def test_a_recipe_names_its_teacher(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"output_dir: {tmp_path}\nuse_cpu: true\nr2_teacher: start\nr2_distillation_temperature: 2")
    training, _ = parse_recipe((R2TrainingArguments,), [str(path), "--r2_distillation_share", "0.9"])
    distillation = (training.r2_teacher, training.r2_distillation_temperature, training.r2_distillation_share)
    assert distillation == ("start", 2.0, 0.9)
    training, _ = parse_recipe((R2TrainingArguments,), [str(path), "--r2_teacher", "float/model"])
    assert training.r2_teacher == "float/model"


@pytest.mark.parametrize("options", [("--nested.bits", "3"), ("--nested.bits=3",)])
def test_dotted_option_overrides_one_key_of_a_mapping(parse, options):
    toy = parse("name: a\nnested: {bits: 2, method: palette}", *options)
    nested = json.loads(toy.nested) if isinstance(toy.nested, str) else toy.nested
    assert nested == {"bits": 3, "method": "palette"}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("name: a\nrtae: 1", (), "unknown key 'rtae'.*did you mean 'rate'"),
        ("name: a", ("--rtae", "1"), "unknown option '--rtae'; did you mean 'rate'"),
        ("name: a\nrate: fast", (), "invalid float value: 'fast'"),
        ("name: a\nrate: -1", (), "rate is negative"),
        ("- a list", (), "not a mapping"),
        ("name: [", (), "cannot read the recipe"),
        ("name: a\nnested: {bits: 2}", ("--nested.bits",), "needs a value"),
    ],
)
def test_mistakes_are_told_in_one_message(parse, capsys, text, options, message):
    with pytest.raises(SystemExit) as error:
        parse(text, *options)
    assert error.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("argv", [[], ["--rate", "1"], ["missing.yaml"]])
def test_a_recipe_has_to_be_named(capsys, argv):
    with pytest.raises(SystemExit):
        parse_recipe((Toy,), argv)
    assert "recipe" in capsys.readouterr().err
