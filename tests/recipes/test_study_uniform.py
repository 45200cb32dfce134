"""The study of uniform quantization: its cells, how learning rates are chosen, and what is published of it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import results
import uniform

STUDY = Path(__file__).parent.parent.parent / "recipes" / "study"
FILE = STUDY / "uniform.yaml"


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The published study without results."""
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    return results.load_study(FILE)


def finish(study, cells, score=lambda spec: 0.5):
    for spec in cells:
        results.save_result(study, spec, {"float": 0.9, "accuracy": score(spec), "accuracy_bn": 0.8})


@pytest.mark.parametrize("method", ["plain", "DFQ", "error-compensated"])
def test_a_cell_after_training_measures_everything(study, method):
    study["start_training"] |= {"max_steps": 2, "warmup_steps": 0}
    spec = uniform.post_training_cell(study, "R2 prox", 0, 4, method)
    assert uniform.run_start((study, [spec])) == 1
    result = results.load_result(study, spec)
    assert set(result) == {"float", "accuracy", "accuracy_bn"}
    assert all(0 <= figure <= 1 for figure in result.values())


def test_a_cell_in_training_measures_everything(study):
    study["start_training"] |= {"max_steps": 2, "warmup_steps": 0}
    study["trained"]["training"] |= {"max_steps": 2}
    spec = uniform.trained_cell(study, "baseline", 1, 2, "LSQ", 0.01, "validation")
    uniform.run_start((study, [spec]))
    assert set(results.load_result(study, spec)) == {"float", "accuracy", "accuracy_bn"}


def test_the_best_learning_rate_is_chosen_and_then_run_on_the_test_split(study):
    row = ("baseline", 2, "EWGS")
    assert uniform.chosen_rate(study, *row) is None
    untrained = len(uniform.tests(study))
    finish(study, uniform.trials(study, *row), lambda spec: 1 - abs(spec["learning_rate"] - 0.03))
    assert uniform.chosen_rate(study, *row) == 0.03
    added = uniform.tests(study)[untrained:]
    assert [(spec["seed"], spec["split"], spec["learning_rate"]) for spec in added] == [
        (seed, "test", 0.03) for seed in study["seeds"]
    ]


def test_trials_and_tests_have_starts_of_their_own(study):
    trial = uniform.trials(study, "baseline", 2, "LSQ")[0]
    test = uniform.post_training_cell(study, "baseline", 0, 2, "plain")
    assert (trial["split"], test["split"]) == ("validation", "test")


def test_rendering_stops_when_a_run_is_missing(study):
    with pytest.raises(SystemExit, match=r"uniform\.py"):
        uniform.render(study)


def test_every_row_is_rendered_with_all_its_runs(study):
    for row in uniform.trained_rows(study):
        finish(study, uniform.trials(study, *row))
    finish(study, uniform.tests(study), lambda spec: spec["seed"] / 10)
    text = uniform.render(study)
    setting = study["post_training"]
    after = len(study["starts"]) * len(setting["methods"]) * len(setting["bits"])
    assert text.count("10.0 ± 10.0") == after + len(uniform.trained_rows(study))


def test_published_tables_are_those_of_the_results():
    command = [sys.executable, STUDY / "uniform.py", FILE, "--render", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_published_results_are_cells_of_the_study():
    study = results.load_study(FILE)
    trials = [spec for row in uniform.trained_rows(study) for spec in uniform.trials(study, *row)]
    expected = {results.result_path(study, spec).name for spec in (*trials, *uniform.tests(study))}
    folder = results.RESULTS / study["name"]
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.iterdir():
        assert results.result_path(study, json.loads(path.read_text(encoding="utf-8"))["cell"]).name == path.name
