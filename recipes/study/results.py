"""Where the studies keep their results: one JSON file per cell, named after a hash of all that determines it."""

import hashlib
import json
from pathlib import Path
from typing import Any

import yaml

from hf_r2.files import atomic_write

RESULTS = Path(__file__).parent / "results"

Study = dict[str, Any]
Cell = dict[str, Any]


def load_study(path: Path) -> Study:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def start_of(spec: Cell) -> Cell:
    """Return the specification of the float model that a cell compresses."""
    return {key: value for key, value in spec.items() if key != "compression"}


def digest(spec: Cell) -> str:
    return hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()[:16]


def folder_of(study: Study, spec: Cell) -> Path:
    """Return the folder of a cell under `RESULTS`: of a task, an optimizer and a restriction where it has them."""
    folder = Path(study["name"])
    if "data" not in spec:
        return folder
    task = f"{spec['data']}-{spec['model']['model_type']}"
    return folder / task / spec["optimizer"] / spec["restriction"].replace(" ", "-")


def result_path(study: Study, spec: Cell) -> Path:
    return RESULTS / folder_of(study, spec) / f"{digest(spec)}.json"


def result_files(study: Study) -> list[Path]:
    """List the files of all finished cells of a study."""
    return sorted((RESULTS / study["name"]).rglob("*.json"))


def load_result(study: Study, spec: Cell) -> dict[str, Any] | None:
    path = result_path(study, spec)
    return json.loads(path.read_text(encoding="utf-8"))["result"] if path.is_file() else None


def save_result(study: Study, spec: Cell, result: dict[str, Any]) -> None:
    path = result_path(study, spec)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, json.dumps({"cell": spec, "result": result}, indent=1, ensure_ascii=False) + "\n")
