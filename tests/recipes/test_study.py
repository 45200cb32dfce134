import json
import subprocess
import sys
from pathlib import Path

import plan
import pytest
import render
from cell import run_cell

STUDY = Path(__file__).parent.parent.parent / "recipes" / "study"
RANGE_RESTRICTION = STUDY / "range_restriction.yaml"
MEASURES = {"float", "train_loss", "crest_factor", "kurtosis", "min_max", "mse", "seconds"}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The published study without results."""
    monkeypatch.setattr(plan, "RESULTS", tmp_path)
    return plan.load_study(RANGE_RESTRICTION)


def finish(study, cells, score):
    for spec in cells:
        result = {"float": 0.9, "min_max": score(spec), "mse": 0.7, "crest_factor": 2.0}
        plan.save_result(study, spec, result)


@pytest.mark.parametrize("restriction", ["none", "l_inf", "clip", "clip once at the end"])
@pytest.mark.parametrize(("data", "extra"), [("digits", {"min_max_bn", "mse_bn"}), ("text", {"bigram"})])
def test_a_cell_of_a_few_steps_measures_everything(study, data, extra, restriction):
    spec = plan.cell(study, data, "adamw", restriction, 0, seed=0, split="validation")
    spec["training"] |= {"max_steps": 2, "warmup_steps": 0}
    result = run_cell(spec)
    assert set(result) == MEASURES | extra
    assert 0 <= result["min_max"] <= 1
    if "clip" in restriction:
        assert result["crest_factor"] < 2.4  # unclipped it is above 2.7; clipping lowers the rms as well


def test_the_best_trial_is_chosen_and_then_run_on_the_test_split(study):
    row = ("digits", "sgd", "l_inf")
    assert plan.chosen(study, row) is None
    assert plan.tests(study, row) == []
    finish(
        study, plan.trials(study, row), lambda spec: {0.01: 0.2, 0.1: 0.8, 1.0: 0.5}[spec["candidate"]["r2_strength"]]
    )
    chosen = plan.tests(study, row)
    assert [spec["seed"] for spec in chosen] == study["seeds"]
    assert {(spec["split"], spec["candidate"]["r2_strength"]) for spec in chosen} == {("test", 0.1)}


def test_a_result_is_found_by_all_that_determines_it(study):
    spec = plan.cell(study, "text", "sgd", "none", 0, seed=1, split="test")
    plan.save_result(study, spec, {"float": 0.5})
    assert plan.load_result(study, spec) == {"float": 0.5}
    for change in (
        {"seed": 2},
        {"split": "validation"},
        {"training": {}},
        {"grain": "tensor"},
        {"candidate": {"a": 1}},
    ):
        assert plan.load_result(study, spec | change) is None


def test_rendering_stops_when_a_run_is_missing(study):
    with pytest.raises(SystemExit, match=r"recipes/study/run\.py"):
        render.render(study)


def test_every_row_is_rendered_with_all_its_runs(study):
    for row in plan.settings(study):
        finish(study, plan.trials(study, row), lambda spec: 0.5)
        finish(study, plan.tests(study, row), lambda spec: spec["seed"] / 10)
    text = render.render(study)
    assert text.count("| 10.0 ± 10.0 |") == len(plan.settings(study)) == text.count("| 2.00 ± 0.00 |")


def test_published_tables_are_those_of_the_results():
    command = [sys.executable, STUDY / "render.py", RANGE_RESTRICTION, "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_published_results_are_cells_of_the_study():
    study = plan.load_study(RANGE_RESTRICTION)
    rows = plan.settings(study)
    cells = [spec for row in rows for spec in (*plan.trials(study, row), *plan.tests(study, row))]
    expected = {plan.result_path(study, spec).name for spec in cells}
    folder = plan.RESULTS / study["name"]
    assert {path.name for path in folder.iterdir()} == expected
    for path in folder.iterdir():
        assert plan.result_path(study, json.loads(path.read_text(encoding="utf-8"))["cell"]).name == path.name


@pytest.mark.parametrize("study", ["dkm", "least_squares"])
def test_published_tables_of_aware_training_are_those_of_the_results(study):
    command = [sys.executable, STUDY / "aware.py", STUDY / f"{study}.yaml", "--render", "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
