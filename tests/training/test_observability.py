"""What of the weights is shown while training and kept with the model."""

import json
import sqlite3

import numpy as np
import pytest
from training_cases import MODELS, make_bert, make_data, make_resnet, regularized_weights, train_logs
from transformers import TrainerCallback

STATISTICS = ("crest_factor", "kurtosis")
ADDED = ("r2_", "task_loss", *STATISTICS)
MODES = {
    "loss": {"r2_strength": 0.1},
    "channels": {"r2_strength": 0.02, "r2_loss": "kurtosis", "r2_grain": "channel"},
    "prox": {"r2_mode": "prox", "r2_strength": 0.5},
    "clip": {"r2_mode": "clip", "r2_clip": 1.4},
    "auto": {"r2_strength": "auto", "r2_target_crest": 1.5},
}
every_mode = pytest.mark.parametrize("mode", MODES)


def numpy_statistics(model, names=None):
    """Crest factor and kurtosis by weight, from their formulas in float64."""
    found = {}
    for name, weight in regularized_weights(model).items():
        values = weight.double().numpy().ravel()
        centred = values - values.mean()
        found[name] = {
            "crest_factor": np.abs(values).max() / np.sqrt(np.mean(values**2)),
            "kurtosis": np.mean(centred**4) / np.mean(centred**2) ** 2,
        }
    return found if names is None else {name: found[name] for name in names}


def summary(statistics):
    """Means and maxima over the weights, as they are logged."""
    values = {key: [one[key] for one in statistics.values()] for key in STATISTICS}
    means = {key: np.mean(values[key]) for key in STATISTICS}
    return means | {f"{key}_max": np.max(values[key]) for key in STATISTICS}


def train_stage(folder):
    (stage,) = json.loads((folder / "manifest.json").read_text())["stages"]
    assert stage["stage"] == "train"
    return stage


class Watch(TrainerCallback):
    """Notes what reports get to see, and what the weights are then."""

    def __init__(self):
        self.seen, self.expected = [], []

    def on_log(self, args, state, control, logs=None, model=None, **kwargs):
        if "loss" in logs:
            self.seen.append(dict(logs))
            self.expected.append(summary(numpy_statistics(model)))


@every_mode
@pytest.mark.parametrize("name", ["bert", "resnet", "gpt2"])
def test_reports_see_the_statistics_of_the_weights_at_every_log(train, name, mode):
    watch = Watch()
    options = {"logging_steps": 2, "learning_rate": 0.02, "trainer_kwargs": {"callbacks": [watch]}}
    trainer = train(MODELS[name](), make_data(name, 48), **options, **MODES[mode])
    assert len(watch.seen) == 3
    for logs, expected in zip(watch.seen, watch.expected, strict=True):
        assert {key: logs[key] for key in expected} == pytest.approx(expected, rel=1e-4)
    assert watch.expected[-1] != watch.expected[0]
    kept = [{key: entry[key] for key in watch.expected[0]} for entry in train_logs(trainer)]
    assert kept == [{key: logs[key] for key in watch.expected[0]} for logs in watch.seen]


@every_mode
def test_only_the_restricted_weights_are_looked_at(train, mode):
    model = make_bert()
    model.classifier.weight.requires_grad_(False)
    options = {"r2_exclude": ["*query*"], "learning_rate": 0.02}
    trainer = train(model, make_data("bert", 8), **options, **MODES[mode])
    names = [name for name in regularized_weights(model) if "query" not in name and "classifier" not in name]
    expected = summary(numpy_statistics(model, names))
    assert {key: train_logs(trainer)[-1][key] for key in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_strength_is_logged_where_it_is_chosen(train, accumulation):
    trainer = train(make_bert(), make_data("bert", 32), gradient_accumulation_steps=accumulation, **MODES["auto"])
    assert train_logs(trainer)[-1]["r2_strength"] == pytest.approx(trainer.strength_target.strengths.mean().item())
    fixed = train(make_bert(), make_data("bert", 8), **MODES["loss"])
    assert "r2_strength" not in train_logs(fixed)[-1]


def test_evaluation_logs_hold_no_statistics(train):
    data = make_data("bert", 16)
    options = {"eval_strategy": "steps", "eval_steps": 1, "trainer_kwargs": {"eval_dataset": data}}
    trainer = train(make_bert(), data, **options, **MODES["loss"])
    evaluations = [entry for entry in trainer.state.log_history if "eval_loss" in entry]
    assert len(evaluations) == 2
    assert not any(key.removeprefix("eval_").startswith(ADDED) for entry in evaluations for key in entry)


@every_mode
def test_the_manifest_holds_the_final_statistics_of_every_weight(train, tmp_path, mode):
    trainer = train(make_bert(), make_data("bert", 16), **MODES[mode])
    trainer.save_model(tmp_path / "saved")
    stage = train_stage(tmp_path / "saved")
    expected = numpy_statistics(trainer.model)
    assert set(stage["weights"]) == set(STATISTICS)
    for key in STATISTICS:
        values = {name: one[key] for name, one in expected.items()}
        assert stage["weights"][key] == pytest.approx(values, rel=1e-4)
    last = [entry for entry in stage["log_history"] if "loss" in entry][-1]
    assert {key: last[key] for key in summary(expected)} == pytest.approx(summary(expected), rel=1e-4)


@pytest.mark.parametrize("options", [{"r2_mode": "none"}, {"r2_strength": 0.0}], ids=str)
def test_without_restriction_nothing_is_added(train, tmp_path, options):
    trainer = train(make_resnet(), make_data("resnet", 16), **options)
    trainer.save_model(tmp_path / "saved")
    stage = train_stage(tmp_path / "saved")
    assert stage["weights"] is None
    assert stage["r2"] is None
    assert trainer.weight_summary() == {}
    assert not any(key.startswith(ADDED) for entry in trainer.state.log_history for key in entry)


def test_trackio_gets_every_log(train, tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))  # read when it is first imported
    pytest.importorskip("trackio")
    trainer = train(make_bert(), make_data("bert", 16), report_to="trackio", run_name="r2", **MODES["loss"])
    (database,) = (tmp_path / "trackio").rglob("*.db")
    with sqlite3.connect(database) as connection:
        stored = [json.loads(row) for (row,) in connection.execute("SELECT metrics FROM metrics ORDER BY step")]
    for key in summary(numpy_statistics(trainer.model)):
        sent = [value for row in stored for name, value in row.items() if name.removeprefix("train/") == key]
        assert sent == pytest.approx([entry[key] for entry in train_logs(trainer)])
