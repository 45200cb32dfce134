import json
import math
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest

from hf_r2.report.manifest import MANIFEST_NAME, Manifest, command_line

NOT_FINITE = [math.nan, math.inf, -math.inf]


def write(directory, text):
    (directory / MANIFEST_NAME).write_text(text, encoding="utf-8")


def added(**facts):
    return Manifest().add("evaluate", **facts)


def test_save_and_load_return_the_stages(tmp_path):
    manifest = Manifest()
    manifest.add("train", strength=0.1, loss="l_inf", epochs=[1, 2], note="λ → 0", final=True, seed=None)
    manifest.add("evaluate", metrics={"accuracy": 0.75, "per_class": {"cat": 1}})
    manifest.save(tmp_path)
    assert Manifest.load(tmp_path).stages == manifest.stages


def test_save_returns_the_path_it_wrote(tmp_path):
    assert Manifest().save(tmp_path) == tmp_path / MANIFEST_NAME


def test_save_leaves_one_file(tmp_path):
    Manifest().save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [MANIFEST_NAME]


def test_a_stage_can_be_added_to_a_loaded_manifest(tmp_path):
    first = Manifest()
    first.add("train")
    first.save(tmp_path)
    second = Manifest.load(tmp_path)
    second.add("quantize")
    second.save(tmp_path)
    assert [entry["stage"] for entry in Manifest.load(tmp_path).stages] == ["train", "quantize"]


def test_a_directory_without_a_manifest_gives_an_empty_one(tmp_path):
    assert Manifest.load(tmp_path).stages == []


def test_add_returns_the_stage_it_kept():
    manifest = Manifest()
    assert manifest.add("train", strength=0.1) is manifest.stages[0]


def test_a_manifest_does_not_change_the_list_it_was_made_from():
    stages = []
    Manifest(stages).add("train")
    assert stages == []


def test_a_stage_says_when_it_finished_in_utc():
    assert datetime.fromisoformat(added()["finished"]).utcoffset().total_seconds() == 0


def test_a_stage_says_where_it_ran():
    environment = added()["environment"]
    assert {"hf_r2", "python", "torch", "transformers"} <= set(environment["versions"])
    assert environment["hardware"]["cpus"] >= 1
    assert environment["command"]


def test_a_run_outside_a_repository_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert added()["environment"]["git_commit"] is None


def test_last_returns_the_newest_stage_of_a_name():
    manifest = Manifest()
    for strength in (0.1, 0.2):
        manifest.add("train", strength=strength)
    manifest.add("evaluate")
    assert manifest.last("train")["strength"] == 0.2


def test_last_of_a_stage_that_never_ran_is_empty():
    assert Manifest().last("train") == {}


@pytest.mark.parametrize("value", NOT_FINITE)
def test_floats_that_are_not_finite_become_null(tmp_path, value):
    manifest = Manifest()
    manifest.add("evaluate", loss=value, metrics={"sqnr": [1.5, value], "by_bits": {2: value}})
    content = json.loads(manifest.save(tmp_path).read_text(), parse_constant=lambda word: pytest.fail(word))
    (stage,) = content["stages"]
    assert (stage["loss"], stage["metrics"]) == (None, {"sqnr": [1.5, None], "by_bits": {"2": None}})


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        ((1, 2), [1, 2]),
        ({3}, [3]),
        (Path("runs") / "a", "runs/a"),
        ({4: {8: 0.5}}, {"4": {"8": 0.5}}),
        (True, True),
        (np.float64(0.25), 0.25),
        (np.float32(0.25), 0.25),
        (np.int64(3), 3),
        (np.float32("nan"), None),
    ],
    ids=repr,
)
def test_facts_become_plain_json_values(value, plain):
    assert added(fact=value)["fact"] == plain


@pytest.mark.parametrize(
    "text",
    [
        "",
        '{"manifest_version": 1, "stages": [',
        "[]",
        '"text"',
        "null",
        "{}",
        '{"manifest_version": 1}',
        '{"stages": []}',
        '{"manifest_version": 1, "stages": {"stage": "train"}}',
        '{"manifest_version": 1, "stages": "train"}',
        '{"manifest_version": 1, "stages": ["train"]}',
        '{"manifest_version": 1, "stages": [{}]}',
        '{"manifest_version": 1, "stages": null}',
    ],
)
def test_a_damaged_manifest_raises_and_says_what_to_do(tmp_path, text):
    write(tmp_path, text)
    with pytest.raises(ValueError, match=r"is not an hf_r2 manifest .*; delete it or restore it"):
        Manifest.load(tmp_path)


def test_a_manifest_that_is_not_text_raises_and_says_what_to_do(tmp_path):
    (tmp_path / MANIFEST_NAME).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"is not an hf_r2 manifest .*; delete it or restore it"):
        Manifest.load(tmp_path)


def test_a_newer_manifest_raises_and_says_to_upgrade(tmp_path):
    write(tmp_path, '{"manifest_version": 2, "stages": []}')
    with pytest.raises(ValueError, match="has version 2, this hf_r2 reads 1; upgrade hf_r2"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        (["--hub_token", "hf_secret"], "--hub_token '***'"),
        (["--hub_token=hf_secret"], "'--hub_token=***'"),
        (["--hub-token=hf=secret"], "'--hub-token=***'"),
        (["--token", "hf_secret", "--bits", "4"], "--token '***' --bits 4"),
        (["--bits", "4", "--token"], "--bits 4 --token"),
        (["--hub_token", "hf_secret", "--token=hf_secret"], "--hub_token '***' '--token=***'"),
        (["--tokenizer", "gpt2", "--tokenizer_name=gpt2"], "--tokenizer gpt2 --tokenizer_name=gpt2"),
        (["--note", "two words"], "--note 'two words'"),
    ],
)
def test_command_line_hides_the_values_of_token_options(arguments, shown):
    assert command_line(["hf-r2", *arguments]) == f"hf-r2 {shown}"


def test_a_stage_does_not_hold_the_token_of_its_command(monkeypatch):
    monkeypatch.setattr("sys.argv", ["recipe.py", "--hub_token", "hf_secret", "--token=hf_secret"])
    assert "hf_secret" not in json.dumps(added())


@pytest.mark.parametrize(
    ("variable", "launcher"),
    [(None, "python"), ("ACCELERATE_MIXED_PRECISION", "accelerate launch"), ("TORCHELASTIC_RUN_ID", "torchrun")],
)
def test_command_line_of_a_script_starts_with_its_launcher(monkeypatch, tmp_path, variable, launcher):
    monkeypatch.chdir(tmp_path)
    for name in ("ACCELERATE_MIXED_PRECISION", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if variable:
        monkeypatch.setenv(variable, "no")
    script = str(tmp_path / "recipes" / "train.py")
    assert command_line([script, "--lr", "0.1"]) == f"{launcher} recipes/train.py --lr 0.1"


def test_command_line_of_a_console_script_holds_no_machine_path():
    assert command_line(["/opt/venv/bin/hf-r2", "inspect", "model"]) == "hf-r2 inspect model"
