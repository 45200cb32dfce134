"""The results of the study as its tables, pictures and conclusions read them: rows and cells by name, figures in %."""

from functools import cached_property

from plan import Row, candidates, cell, chosen, compressions, rows, starts, trials
from results import Cell, Study, folder_of, load_result
from scipy.stats import spearmanr

Run = dict[str, float]


class Measured:
    """All results on the test split.

    Args:
        study: the study, all of whose cells are finished.

    Raises:
        SystemExit: when a result is asked for that is not there.
    """

    def __init__(self, study: Study) -> None:
        self.study = study
        self._starts: dict[Row, list[Cell]] = {}
        self._runs: dict[tuple[Row, str], list[Run]] = {}

    @cached_property
    def rows(self) -> list[Row]:
        """All rows in the order of the file."""
        return rows(self.study)

    @cached_property
    def pairs(self) -> list[tuple[str, str]]:
        """List all tasks and optimizers in the order of the file."""
        return list(dict.fromkeys((row.task, row.optimizer) for row in self.rows))

    def rows_of(self, task: str, optimizer: str) -> list[Row]:
        """List the rows of a task and an optimizer."""
        return [row for row in self.rows if (row.task, row.optimizer) == (task, optimizer)]

    def compressions(self, row: Row) -> list[str]:
        """List the names of what compresses the models of a row."""
        return compressions(self.study, row)

    def starts(self, row: Row) -> list[Cell]:
        """List the float models of a row, one per seed."""
        if row not in self._starts:
            self._starts[row] = starts(self.study, row)
        return self._starts[row]

    def runs(self, row: Row, compression: str) -> list[Run]:
        """Return the results of a row and a compression, one per seed."""
        if (row, compression) not in self._runs:
            cells = [cell(self.study, row, start, compression) for start in self.starts(row)]
            found = [load_result(self.study, spec) for spec in cells]
            if not found or None in found:
                raise SystemExit(f"{row}, {compression}: not all seeds are there. Run recipes/study/run.py")
            self._runs[row, compression] = found
        return self._runs[row, compression]

    def figures(self, row: Row, compression: str, best: bool = False) -> list[float]:
        """Return accuracies in %, one per seed; with `best`, with batch norm re-estimated where there is any."""
        key = "accuracy_bn" if best else "accuracy"
        return [100 * run.get(key, run["accuracy"]) for run in self.runs(row, compression)]

    def recoveries(self, row: Row, compression: str, best: bool = False) -> list[float]:
        """Return compressed accuracy over that of the same float model in %, one per seed."""
        pairs = zip(self.figures(row, compression, best=best), self.figures(row, "float"), strict=True)
        return [100 * compressed / floats for compressed, floats in pairs]

    def bits_per_weight(self, row: Row, compression: str) -> float:
        """Return the bits of codes, scales and tables over the number of weights."""
        float_bytes = self.runs(row, "float")[0]["weight_bytes"]
        return 32 * self.runs(row, compression)[0]["weight_bytes"] / float_bytes

    def choice(self, row: Row) -> str:
        """Name what was chosen of a row's candidates."""
        if not trials(self.study, row):
            return ""
        options = candidates(self.study, row)
        varied = [key for key in options[0] if len({str(option[key]) for option in options}) > 1]
        picked = options[chosen(self.study, row)]
        return ", ".join(f"{key.removeprefix('r2_').replace('_', ' ')} {picked[key]:g}" for key in varied)

    def folder(self, row: Row) -> str:
        """Return the folder of a row's cells among the results."""
        return folder_of(self.study, self.starts(row)[0]).as_posix()

    def crest_correlation(self, task: str, optimizer: str, compression: str, best: bool = False) -> float:
        """Correlate crest factors of float models with recoveries, by ranks over all restrictions and seeds."""
        chosen_rows = self.rows_of(task, optimizer)
        crests = [run["crest_factor"] for row in chosen_rows for run in self.runs(row, "float")]
        recoveries = [each for row in chosen_rows for each in self.recoveries(row, compression, best)]
        return float(spearmanr(crests, recoveries).statistic)
