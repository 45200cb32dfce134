"""Checking a checkpoint against its manifest and card: on the Hub, in a directory, sound and damaged."""

import json
from contextlib import suppress

import pytest
from datasets import DatasetDict
from huggingface_hub.errors import HfHubHTTPError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from hf_r2.cli import app
from hf_r2.evaluation import LabelledData, evaluate_checkpoint
from hf_r2.hub import push, verify
from hf_r2.report import Manifest
from hf_r2.report.results import record_figures

NAME = "alice/digits-2bit"
run = CliRunner().invoke


@pytest.fixture(scope="session")
def figures(compressed):
    return evaluate_checkpoint(compressed, LabelledData("digits"), compressed.with_name("digits-float"))


@pytest.fixture
def evaluated(checkpoint, figures):
    """A checkpoint whose card publishes figures, with the float model beside it."""
    record_figures(checkpoint, LabelledData("digits"), figures, seconds=1.0)
    return checkpoint


@pytest.fixture
def float_model(compressed):
    return compressed.with_name("digits-float")


def results(checks):
    return {check.figure: check.result for check in checks}


def test_a_sound_checkpoint_passes_every_check(evaluated, float_model):
    checks = verify(evaluated, float_source=float_model)
    figures = ["card", "SHA-256", "bytes", "bits per weight", "accuracy", "loss", "examples"]
    assert [check.figure for check in checks] == [*figures, "recovery", "agreement", "kl"]
    assert {check.result for check in checks} == {"pass"}


@pytest.mark.parametrize("revision", ["", "@main", "@v1", "@{commit}", "@refs/pr/1"])
def test_every_revision_of_a_published_checkpoint_can_be_checked(api, evaluated, float_model, revision):
    commit = push(evaluated, NAME)
    api.create_tag(NAME, tag="v1")
    (evaluated / "chat_template.jinja").write_text("{{ text }}")
    push(evaluated, NAME, create_pr=True)
    checks = verify(NAME + revision.format(commit=commit.oid), float_source=float_model)
    assert {check.result for check in checks} == {"pass"}


def test_the_hubs_own_errors_come_through(hub, evaluated, monkeypatch):
    push(evaluated, NAME, private=True)
    with pytest.raises(RevisionNotFoundError):
        verify(f"{NAME}@nowhere")
    with pytest.raises(RepositoryNotFoundError):
        verify("alice/missing")
    monkeypatch.setenv("HF_TOKEN", "wrong")
    with pytest.raises(HfHubHTTPError):
        verify(NAME)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        verify(NAME)


def test_figures_without_their_float_model_are_not_checked(evaluated):
    checks = {check.figure: check for check in verify(evaluated)}
    for figure in ("recovery", "agreement", "kl"):
        assert checks[figure].result == "not checked"
        assert "say where it is with --float" in checks[figure].note
    assert checks["accuracy"].result == "pass"


def test_the_float_model_is_found_on_the_hub(hub, evaluated, float_model):
    push(float_model, "alice/digits-float")
    manifest = Manifest.load(evaluated)
    manifest.last("quantize")["base_model"] = "alice/digits-float"
    manifest.save(evaluated)
    assert {check.result for check in verify(evaluated)} == {"pass"}


def test_local_data_are_looked_for_where_the_user_says(evaluated, float_model, tmp_path):
    DatasetDict(test=LabelledData("digits").load()).save_to_disk(tmp_path / "copy")
    manifest = Manifest.load(evaluated)
    manifest.last("evaluate")["data"] |= {"name": "my-digits", "hub_name": None}
    manifest.save(evaluated)
    checks = verify(evaluated, float_source=float_model)
    assert results(checks)["SHA-256"] == "pass"
    assert {check.result for check in checks[4:]} == {"not checked"}
    assert "'my-digits' is not on the Hub" in checks[-1].note
    checks = verify(evaluated, data=str(tmp_path / "copy"), float_source=float_model)
    assert {check.result for check in checks} == {"pass"}


def test_data_of_the_hub_are_downloaded_at_their_commit(api, evaluated, float_model, monkeypatch, tmp_path):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
    examples = LabelledData("digits").load()
    api.create_repo("alice/digits", repo_type="dataset")
    examples.to_parquet(tmp_path / "test-00000-of-00001.parquet")
    upload = {"path_in_repo": "data/test-00000-of-00001.parquet", "repo_id": "alice/digits", "repo_type": "dataset"}
    commit = api.upload_file(path_or_fileobj=tmp_path / "test-00000-of-00001.parquet", **upload)
    examples.select(range(10)).to_parquet(tmp_path / "other.parquet")
    api.upload_file(path_or_fileobj=tmp_path / "other.parquet", **upload)
    manifest = Manifest.load(evaluated)
    manifest.last("evaluate")["data"] = LabelledData("alice/digits", revision=commit.oid).facts()
    manifest.save(evaluated)
    assert {check.result for check in verify(evaluated, float_source=float_model)} == {"pass"}


# --- what is wrong --------------------------------------------------------------------------------------------------


def change_bit(folder):
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("convolution.weight"))
    tensors[name][0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_bias_and_dtype(folder):
    """Change what is not compressed, and ask in config.json for a dtype in which that would not be compared."""
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("normalization.bias"))
    tensors[name] += 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "dtype": "bfloat16"}))


def exchange_digests(folder):
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["sha256"]["rest"] = "0" * 64
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize("damage", [change_bit, change_bias_and_dtype, exchange_digests])
def test_changed_weights_fail_and_nothing_else_is_vouched_for(evaluated, float_model, damage):
    damage(evaluated)
    checks = results(verify(evaluated, float_source=float_model))
    assert checks["SHA-256"] == "fail"
    assert checks["accuracy"] == checks["kl"] == "not checked"


@pytest.mark.parametrize("figure", ["accuracy", "loss", "examples", "recovery", "agreement", "kl"])
def test_a_figure_that_was_made_up_fails(evaluated, float_model, figure):
    manifest = Manifest.load(evaluated)
    row = manifest.last("evaluate")["rows"][0]
    row[figure] = row[figure] * 1.1 + 0.01
    manifest.save(evaluated)
    checks = results(verify(evaluated, float_source=float_model))
    wrong = {figure, "card"} if figure == "accuracy" else {figure}
    assert {name for name, result in checks.items() if result == "fail"} == wrong


def test_a_card_that_claims_something_else_fails(evaluated, float_model):
    path = evaluated / "README.md"
    accuracy = Manifest.load(evaluated).last("evaluate")["rows"][0]["accuracy"]
    path.write_text(path.read_text(encoding="utf-8").replace(f"value: {accuracy}", "value: 0.999"), encoding="utf-8")
    assert results(verify(evaluated, float_source=float_model))["card"] == "fail"
    path.unlink()
    assert results(verify(evaluated, float_source=float_model))["card"] == "fail"


def test_sizes_that_were_made_up_fail(evaluated, float_model):
    manifest = Manifest.load(evaluated)
    manifest.last("quantize")["bytes"]["compressed"] -= 1
    manifest.last("quantize")["weights"][0]["bits_per_weight"] = 1.0
    manifest.save(evaluated)
    checks = results(verify(evaluated, float_source=float_model))
    assert (checks["bytes"], checks["bits per weight"]) == ("fail", "fail")


@pytest.mark.parametrize("stage", ["quantize", "evaluate"])
def test_a_manifest_with_holes_is_one_clear_error(evaluated, stage):
    whole = Manifest.load(evaluated)
    for key in sorted(whole.last(stage).keys() - {"stage"}):
        manifest = Manifest.load(evaluated)
        del manifest.last(stage)[key]
        manifest.save(evaluated)
        with suppress(ValueError):
            verify(evaluated)
        whole.save(evaluated)
    del whole.last("quantize")["bytes"]
    whole.save(evaluated)
    with pytest.raises(ValueError, match="incomplete or was changed by hand"):
        verify(evaluated)


# --- command line ---------------------------------------------------------------------------------------------------


def test_the_exit_status_is_zero_only_if_every_claim_was_checked_and_holds(evaluated, float_model):
    sound = run(app, ["verify", str(evaluated), "--float", str(float_model)])
    assert sound.exit_code == 0, sound.output
    assert "10 hold, 0 fail, 0 could not be checked" in sound.stdout
    partly = run(app, ["verify", str(evaluated)])
    assert partly.exit_code == 1
    assert "7 hold, 0 fail, 3 could not be checked" in partly.stdout
    assert "not checked  kl" in partly.stdout
    change_bit(evaluated)
    damaged = run(app, ["verify", str(evaluated), "--json"])
    assert damaged.exit_code == 1
    assert {"fail", "not checked", "pass"} == {check["result"] for check in json.loads(damaged.stdout)}


def test_mistakes_are_one_message(hub, float_model, monkeypatch):
    messages = {str(float_model): "nothing to check it by", "alice/missing": "Repository Not Found"}
    for source, message in messages.items():
        result = run(app, ["verify", source])
        assert result.exit_code == 1
        assert message in result.stderr
        assert "Traceback" not in result.output
    hub.fault("GET /api", times=100, status=500)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    assert run(app, ["verify", "alice/missing"]).exit_code == 1
