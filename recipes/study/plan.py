"""What the study runs: the cells of a YAML file, and where their results are kept."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from hf_r2.files import atomic_write

RESULTS = Path(__file__).parent / "results"
CHOSEN_BY = "min_max"


def load_study(path: Path) -> dict[str, Any]:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def cell(study: dict[str, Any], data: str, optimizer: str, restriction: str, index: int, seed: int, split: str) -> dict:
    """Specify one cell completely: whatever changes its result is in it."""
    setting = study["data"][data]
    return {
        "data": data,
        "optimizer": optimizer,
        "restriction": restriction,
        "candidate": candidates(study, data, optimizer, restriction)[index],
        "seed": seed,
        "split": split,
        "model": setting["model"],
        "grain": setting["grain"],
        "first_and_last": setting["first_and_last"],
        "training": {**setting["training"], **setting["optimizers"][optimizer]},
    }


def candidates(study: dict[str, Any], data: str, optimizer: str, restriction: str) -> list[dict[str, Any]]:
    """List a row's candidates: the file has one list for all, or one for each data set or optimizer."""
    found = study["restrictions"][restriction]
    return found[data if data in found else optimizer] if isinstance(found, dict) else found


def settings(study: dict[str, Any]) -> list[tuple[str, str, str]]:
    """List data set, optimizer and restriction of every row, in the order of the file."""
    return [
        (data, optimizer, restriction)
        for data, setting in study["data"].items()
        for optimizer in setting["optimizers"]
        for restriction in study["restrictions"]
    ]


def trials(study: dict[str, Any], row: tuple[str, str, str]) -> list[dict[str, Any]]:
    """List the cells that a row's candidate is chosen from; none if there is nothing to choose."""
    count = len(candidates(study, *row))
    return [cell(study, *row, index, study["seeds"][0], "validation") for index in range(count)] if count > 1 else []


def chosen(study: dict[str, Any], row: tuple[str, str, str]) -> int | None:
    """Return the candidate with the best compressed accuracy on the validation split; None while a trial is missing."""
    results = [load_result(study, trial) for trial in trials(study, row)]
    if None in results:
        return None
    return max(range(len(results)), key=lambda index: results[index][CHOSEN_BY]) if results else 0


def tests(study: dict[str, Any], row: tuple[str, str, str]) -> list[dict[str, Any]]:
    """List a row's cells on the test split, once its candidate is chosen."""
    index = chosen(study, row)
    return [] if index is None else [cell(study, *row, index, seed, "test") for seed in study["seeds"]]


def result_path(study: dict[str, Any], spec: dict[str, Any]) -> Path:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]
    return RESULTS / study["name"] / f"{digest}.json"


def load_result(study: dict[str, Any], spec: dict[str, Any]) -> dict[str, Any] | None:
    path = result_path(study, spec)
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.is_file() else None


def save_result(study: dict[str, Any], spec: dict[str, Any], result: dict[str, Any]) -> None:
    path = result_path(study, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"cell": spec, "result": result}, indent=1, ensure_ascii=False) + "\n")
