"""What the README claims, held against the published manifests and cards."""

from pathlib import Path
from statistics import fmean

import pytest
import render_results
import yaml
from huggingface_hub import ModelCard

from hf_r2.report import Manifest
from hf_r2.report.card import build_card

ROOT = Path(__file__).parent.parent.parent
PUBLISHED = sorted((ROOT / "model_cards").iterdir())
RUNS = sorted((ROOT / "model_cards").glob("*/*/manifest.json"))
DIGITS = sorted((ROOT / "model_cards/digits-resnet-r2-2bit").glob("seed-*"))


def rows_of(run):
    rows = Manifest.load(run).last("evaluate")["rows"]
    return {(row["recipe"], row["weights"], row["batch_norm"]): row for row in rows}


@pytest.mark.parametrize("readme", sorted(render_results.contents()), ids=lambda path: path.parent.name)
def test_readme_table_is_rendered_from_the_manifests(readme):
    text = readme.read_text(encoding="utf-8")
    assert render_results.BEGIN in text
    assert text == render_results.insert(text, render_results.contents()[readme])


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_published_runs_are_of_seeds_0_to_2_and_the_committed_recipe(folder):
    runs = [Manifest.load(run) for run in sorted(folder.glob("seed-*"))]
    assert [run.last("train")["seed"] for run in runs] == [0, 1, 2]
    for run in runs:
        recipe = run.last("evaluate")["recipe"]
        assert recipe["text"] == (ROOT / recipe["path"]).read_text(encoding="utf-8").strip()
        assert run.last("evaluate")["data"]["split"] == "test"


def test_digits_collapse_without_r2_and_keep_most_with_it():
    runs = [rows_of(run) for run in DIGITS]

    def mean(*key):
        return fmean(run[key]["accuracy"] for run in runs)

    assert all(run["baseline", "2-bit", "as trained"]["collapsed"] for run in runs)
    assert mean("R2", "2-bit", "as trained") >= 0.70
    assert abs(mean("baseline", "float", "as trained") - mean("R2", "float", "as trained")) <= 0.01


@pytest.mark.parametrize("manifest", RUNS, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_card_is_rendered_from_its_manifest(manifest):
    card = build_card(Manifest.load(manifest.parent))
    assert str(card) == (manifest.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("manifest", RUNS, ids=lambda path: f"{path.parts[-3]}-{path.parts[-2]}")
def test_card_has_its_metadata_and_no_placeholder(manifest):
    card = ModelCard.load(manifest.parent / "README.md")
    assert card.data.base_model_relation == "quantized"
    assert card.data.base_model
    assert card.data.library_name == "transformers"
    assert card.data.pipeline_tag == Manifest.load(manifest.parent).last("evaluate")["pipeline_tag"]
    bits = Manifest.load(manifest.parent).last("quantize")["quantization_config"]["bits"]
    assert {"hf_r2", f"{bits}-bit"} <= set(card.data.tags)
    assert card.data.eval_results[0].metric_type == "accuracy"
    for placeholder in ("More Information Needed", "TODO", "None", "nan", "{{", "/tmp/"):
        assert placeholder not in card.text
    picture = Manifest.load(manifest.parent).last("evaluate")["picture"]
    assert f"]({picture})" in card.text
    assert (manifest.parent / picture).read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("study", sorted(ROOT.glob("recipes/study/*.yaml")), ids=lambda path: path.stem)
def test_study_header_holds_its_launch_line(study):
    text = study.read_text(encoding="utf-8")
    assert "python recipes/study/" in text.partition(f" {study.relative_to(ROOT)}\n")[0]
    assert yaml.safe_load(text)["name"]
