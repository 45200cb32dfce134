"""What the study of study.yaml runs: its float models, the cells that compress them, and how strengths are chosen."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from results import Cell, Study, load_result


class Row(NamedTuple):
    """A line of a table: a task, an optimizer and a range restriction, by their names in the file."""

    task: str
    optimizer: str
    restriction: str


def rows(study: Study) -> list[Row]:
    """List all rows in the order of the file."""
    return [
        Row(task, optimizer, restriction)
        for task, setting in study["tasks"].items()
        for optimizer in setting["optimizers"]
        for restriction in study["restrictions"]
    ]


def candidates(study: Study, row: Row) -> list[dict[str, Any]]:
    """List a row's candidates: the file has one list for all, or one for each grain or optimizer."""
    found = study["restrictions"][row.restriction]
    grain = study["tasks"][row.task]["grain"]
    return found if isinstance(found, list) else found[grain if grain in found else row.optimizer]


def float_model(study: Study, row: Row, index: int, seed: int, split: str) -> Cell:
    """Specify a float model completely: whatever changes it is in it, and the split that it is measured on."""
    setting = study["tasks"][row.task]
    return {
        "data": setting["data"],
        "optimizer": row.optimizer,
        "restriction": row.restriction,
        "candidate": candidates(study, row)[index],
        "seed": seed,
        "split": split,
        "model": setting["model"],
        "grain": setting["grain"],
        "first_and_last": setting["first_and_last"],
        "training": {**setting["training"], **setting["optimizers"][row.optimizer]},
    }


def cell(study: Study, row: Row, start: Cell, compression: str) -> Cell:
    """Specify a cell completely: a float model, and how it is compressed."""
    settings = {**study["compressions"], **study["compared"]["compressions"]}[compression]
    if needs_training(settings):
        settings = {**settings, "training": study["tasks"][row.task]["aware_training"]}
    return {**start, "compression": settings}


def needs_training(settings: dict[str, Any]) -> bool:
    """Tell whether a compression is trained through."""
    return "aware" in settings


def is_compared(spec: Cell) -> bool:
    """Tell whether a cell is one of those that take long: trained through compression, or of another library."""
    return bool({"aware", "peer"} & spec["compression"].keys())


def trials(study: Study, row: Row) -> list[Cell]:
    """List the cells that a row's candidate is chosen from; none if there is nothing to choose."""
    count = len(candidates(study, row))
    starts = [float_model(study, row, index, study["seeds"][0], "validation") for index in range(count)]
    names = ("float", study["chosen_by"])
    return [cell(study, row, start, name) for start in starts for name in names] if count > 1 else []


def chosen(study: Study, row: Row) -> int | None:
    """Return the candidate with the best compressed accuracy on the validation split; None while a trial is missing."""
    results = [load_result(study, trial) for trial in trials(study, row)][1::2]
    if None in results:
        return None
    return max(range(len(results)), key=lambda index: results[index]["accuracy"]) if results else 0


def compressions(study: Study, row: Row) -> list[str]:
    """List the names of what compresses the models of a row."""
    compared = study["compared"]
    if compared["tasks"].get(row.task) != row.optimizer or row.restriction not in compared["restrictions"]:
        return list(study["compressions"])
    more = [name for name in compared["compressions"] if row.task not in compared["left_out"].get(name, ())]
    return [*study["compressions"], *more]


def starts(study: Study, row: Row) -> list[Cell]:
    """List a row's float models on the test split, one per seed, once its candidate is chosen."""
    index = chosen(study, row)
    return [] if index is None else [float_model(study, row, index, seed, "test") for seed in study["seeds"]]


def tests(study: Study, row: Row) -> list[Cell]:
    """List a row's cells on the test split, once its candidate is chosen."""
    found = starts(study, row)
    return [cell(study, row, start, name) for name in compressions(study, row) for start in found]


def all_cells(study: Study) -> Iterator[Cell]:
    """Walk through all cells, as far as candidates are chosen."""
    for row in rows(study):
        yield from trials(study, row)
        yield from tests(study, row)
