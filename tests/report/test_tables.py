import pytest

from hf_r2.report.tables import markdown_table, result_table


def row(accuracy, weights="2-bit", collapsed=False):
    return {
        "recipe": "R2", "weights": weights, "batch_norm": "as trained", "accuracy": accuracy, "collapsed": collapsed,
        "recovery": accuracy, "crest_factor": 1.5, "bytes": 12345, "ratio": 9.25,
    }  # fmt: skip


def cells(table, line):
    return [cell.strip() for cell in table.splitlines()[line].strip("|").split("|")]


def test_one_run_is_shown_as_it_is():
    assert cells(result_table([[row(0.912)]]), 2) == [
        "R2", "2-bit", "as trained", "91.2%", "91.2%", "1.50", "12,345", "9.2×",
    ]  # fmt: skip


def test_several_runs_are_shown_as_mean_and_sample_deviation():
    assert cells(result_table([[row(0.9)], [row(0.7)]]), 2)[3] == "80.0% ± 14.1%"


def test_collapsed_runs_are_counted():
    assert cells(result_table([[row(0.1, collapsed=True)]]), 2)[3] == "10.0% (collapsed)"
    runs = [[row(0.1, collapsed=True)], [row(0.9)]]
    assert cells(result_table(runs), 2)[3].endswith("(1 of 2 collapsed)")


def test_runs_of_different_recipes_do_not_mix():
    with pytest.raises(ValueError, match="different rows"):
        result_table([[row(0.9)], [row(0.9, weights="3-bit")]])


def test_columns_line_up():
    lines = markdown_table(("a", "b"), [("long cell", "1"), ("x", "22")]).splitlines()
    assert len({len(line) for line in lines}) == 1
