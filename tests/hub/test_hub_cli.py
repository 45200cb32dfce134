"""The console script where it evaluates, publishes and takes apart."""

import json

import pytest
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification
from typer.testing import CliRunner

from hf_r2.cli import app
from hf_r2.report import Manifest

NAME = "alice/digits-2bit"
run = CliRunner().invoke


def test_push_prints_where_the_model_is(api, checkpoint):
    result = run(app, ["push", str(checkpoint), NAME, "--private", "--with-float-revision", "float"])
    assert result.exit_code == 0, result.output
    assert f"published: {api.endpoint}/{NAME}/commit/{api.model_info(NAME).sha}" in result.stdout
    assert api.model_info(NAME).private
    assert "float" in [branch.name for branch in api.list_repo_refs(NAME).branches]
    result = run(app, ["push", str(checkpoint), NAME, "--create-pr", "--json"])
    answer = json.loads(result.stdout)
    assert answer["url"].endswith("/discussions/1")
    assert answer["commit"] == api.model_info(NAME, revision="refs/pr/1").sha


def test_a_push_that_fails_is_one_message(hub, checkpoint, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.fault("POST /api/repos", times=100, drop_after=0)  # the client reports this by an error of its transport
    for arguments in ([str(checkpoint), NAME], [str(checkpoint.parent), NAME], [str(checkpoint), "not/a/name"]):
        result = run(app, ["push", *arguments])
        assert result.exit_code == 1
        assert result.stderr.startswith("error: ")
        assert "Traceback" not in result.output
        assert isinstance(result.exception, SystemExit)


def test_dequantize_leaves_an_ordinary_checkpoint(checkpoint, tmp_path):
    result = run(app, ["dequantize", str(checkpoint), str(tmp_path / "out")])
    assert result.exit_code == 0, result.output
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert getattr(model, "hf_quantizer", None) is None
    result = run(app, ["dequantize", str(tmp_path / "out"), str(tmp_path / "again")])
    assert result.exit_code == 1
    assert "is not compressed by hf_r2" in result.stderr


def test_evaluate_prints_figures_and_records_them_when_asked(compressed, checkpoint):
    before = (checkpoint / "manifest.json").read_bytes()
    arguments = ["evaluate", str(checkpoint), "--data", "digits", "--float", str(compressed.with_name("digits-float"))]
    figures = json.loads(run(app, [*arguments, "--json"]).stdout)
    assert {"accuracy", "loss", "examples", "recovery", "agreement", "kl"} <= set(figures)
    assert (checkpoint / "manifest.json").read_bytes() == before
    result = run(app, [*arguments, "--record"])
    assert f"accuracy       {figures['accuracy']}" in result.stdout
    row = Manifest.load(checkpoint).last("evaluate")["rows"][0]
    assert row["agreement"] == figures["agreement"]
    card = ModelCard.load(checkpoint / "README.md")
    assert card.data.eval_results[0].metric_value == figures["accuracy"]
    assert "One run.\n" in card.text
    assert "Kullback-Leibler divergence" in card.text
    for placeholder in ("None", "nan", "Undefined"):
        assert placeholder not in card.text
    assert run(app, ["verify", *arguments[1:2], *arguments[-2:]]).exit_code == 0


def test_evaluate_names_the_mistake(checkpoint, compressed):
    for arguments, message in (
        (["--data", "digits", "--split", "tset"], "has no split 'tset'"),
        (["--data", "digits", "--input", "picture"], "has no column 'picture'"),
    ):
        result = run(app, ["evaluate", str(checkpoint), *arguments])
        assert result.exit_code == 1
        assert message in result.stderr
    result = run(app, ["evaluate", str(compressed.with_name("digits-float")), "--data", "digits", "--record"])
    assert result.exit_code == 1
    assert "has no manifest of a compressed checkpoint" in result.stderr


def test_quantize_takes_a_config_and_calibration_data(compressed, tmp_path):
    settings = tmp_path / "settings.yaml"
    settings.write_text("method: uniform\nbits: 3\ngrid: full\noverrides:\n  classifier.*: {bits: 8}\n")
    source, out = str(compressed.with_name("digits-float")), tmp_path / "out"
    options = ["--config", str(settings), "--bits", "2", "--refine", "compensate", "--refine", "batch_norm"]
    result = run(app, ["quantize", source, str(out), *options, "--data", "digits", "--examples", "64"])
    assert result.exit_code == 0, result.output
    config = AutoModelForImageClassification.from_pretrained(out).config.quantization_config
    assert (config.bits, config.grid, config.refine) == (2, "full", ["compensate", "batch_norm"])
    assert config.settings_for("classifier.1.weight").bits == 8
    settings.write_text("bits: [")
    assert run(app, ["quantize", source, str(out), "--config", str(settings)]).exit_code == 1
    settings.write_text("bites: 3")
    assert "did you mean 'bits'?" in run(app, ["quantize", source, str(out), "--config", str(settings)]).stderr


@pytest.mark.parametrize("command", ["card", "dequantize", "evaluate", "push", "quantize", "verify"])
def test_help_has_an_example_and_wrong_usage_ends_with_2(command):
    shown = run(app, [command, "--help"])
    assert shown.exit_code == 0
    assert f"Example: hf-r2 {command} " in shown.stdout
    assert run(app, [command]).exit_code == 2
    assert run(app, [command, "--no-such-option"]).exit_code == 2
