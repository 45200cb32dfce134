"""Recipe arguments: a YAML file, then command-line overrides, checked by transformers' own parser."""

import difflib
import json
import sys
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from transformers import HfArgumentParser


def parse_recipe(dataclass_types: Sequence[type], argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Parse `RECIPE.yaml [--key value …] [--section.key value …]` into dataclasses.

    Every key of the YAML file is an argument of one of the dataclasses; a mapping (such as `quantization`) stays one,
    and a dotted option overrides a single key of it: `--quantization.bits 3`.

    Returns:
        One instance of each dataclass, and the path of the YAML file as the last item.

    Raises:
        SystemExit: with a message for a missing file, an unknown key (and its nearest known one) or a bad value.
    """
    parser = HfArgumentParser(dataclass_types, usage="%(prog)s RECIPE.yaml [--key value …] [--section.key value …]")
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0].startswith("-"):
        parser.error("the first argument is a recipe, for example recipes/vision/digits/r2_2bit.yaml")
    path = Path(arguments.pop(0))
    recipe = load_recipe(path, parser)
    known = {action.dest for action in parser._actions}
    for key in recipe:
        if key not in known:
            parser.error(f"unknown key {key!r} in {path}{_hint(key, known)}")
    arguments = apply_dotted(recipe, arguments, parser)
    options = [*_as_options(recipe), *arguments]
    try:
        *dataclasses, remaining = parser.parse_args_into_dataclasses(options, return_remaining_strings=True)
    except ValueError as error:
        parser.error(str(error))
    if remaining:
        parser.error(f"unknown option {remaining[0]!r}{_hint(remaining[0].lstrip('-'), known)}")
    return (*dataclasses, path)


def load_recipe(path: Path, parser: ArgumentParser) -> dict[str, Any]:
    """Read a recipe's keys and values; whatever is wrong with the file ends the program with a message."""
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        parser.error(f"cannot read the recipe {path}: {error}")
    if not isinstance(recipe, dict):
        parser.error(f"the recipe {path} is not a mapping of keys to values")
    return recipe


def apply_dotted(recipe: dict[str, Any], arguments: list[str], parser: ArgumentParser) -> list[str]:
    """Write `--section.key value` into the recipe's mappings; return the other arguments."""
    rest: list[str] = []
    position = 0
    while position < len(arguments):
        option, equals, value = arguments[position].partition("=")
        section, dot, key = option.removeprefix("--").partition(".")
        if not (option.startswith("--") and dot and isinstance(recipe.get(section), dict)):
            rest.append(arguments[position])
            position += 1
            continue
        if not equals:
            position += 1
            if position == len(arguments):
                parser.error(f"{option} needs a value")
            value = arguments[position]
        recipe[section] = {**recipe[section], key: yaml.safe_load(value)}
        position += 1
    return rest


def _as_options(recipe: dict[str, Any]) -> list[str]:
    """Turn a recipe into command-line options, so that both go through the same conversions (1e-3 is text in YAML)."""
    options: list[str] = []
    for key, value in recipe.items():
        if value is None:
            continue
        if isinstance(value, dict):
            options += [f"--{key}", json.dumps(value)]
        elif isinstance(value, list):
            options += [f"--{key}", *map(str, value)]
        else:
            options += [f"--{key}", str(value)]
    return options


def _hint(key: str, known: set[str]) -> str:
    near = difflib.get_close_matches(key, sorted(known), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""
