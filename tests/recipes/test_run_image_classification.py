"""The main job as its users run it, in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_r2.report import Manifest

ROOT = Path(__file__).parent.parent.parent
RECIPE = "recipes/vision/digits/r2_2bit.yaml"
SHORT = (
    "--max_steps",
    "4",
    "--warmup_steps",
    "1",
    "--calibration_examples",
    "64",
    "--per_device_train_batch_size",
    "8",
)

pytestmark = pytest.mark.slow


def launch(*arguments, **variables):
    command = [str(Path(sys.executable).with_name("accelerate")), "launch", *arguments]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "warning", **variables}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)


@pytest.fixture(scope="module")
def main_job(tmp_path_factory):
    output = tmp_path_factory.mktemp("main") / "run"
    return output, launch("recipes/run_image_classification.py", RECIPE, "--output_dir", str(output))


def test_main_job_ends_with_the_table(main_job):
    _, result = main_job
    assert result.returncode == 0, result.stderr[-2000:]
    assert "| R2       | 2-bit   | re-estimated |" in result.stdout + result.stderr


def test_main_job_shows_what_r2_is_for(main_job):
    rows = Manifest.load(main_job[0] / "compressed").last("evaluate")["rows"]
    accuracy = {(row["recipe"], row["weights"], row["batch_norm"]): row["accuracy"] for row in rows}
    assert min(accuracy["baseline", "float", "as trained"], accuracy["R2", "float", "as trained"]) > 0.95
    assert accuracy["baseline", "2-bit", "as trained"] < 0.35
    assert accuracy["R2", "2-bit", "as trained"] > accuracy["baseline", "2-bit", "as trained"] + 0.3
    assert accuracy["R2", "2-bit", "re-estimated"] > 0.9


def test_main_job_leaves_a_small_checkpoint_with_card_manifest_and_picture(main_job):
    compressed = main_job[0] / "compressed"
    names = {path.name for path in compressed.iterdir()}
    assert names == {
        "README.md", "config.json", "manifest.json", "model.safetensors", "preprocessor_config.json", "weights.png",
    }  # fmt: skip
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (compressed, main_job[0] / "float")]
    assert sizes[0] * 8 < sizes[1]
    assert [stage["stage"] for stage in Manifest.load(compressed).stages] == ["train", "quantize", "evaluate"]


def test_main_job_refuses_to_overwrite_an_earlier_run(main_job):
    result = launch("recipes/run_image_classification.py", RECIPE, "--output_dir", str(main_job[0]), *SHORT)
    assert result.returncode != 0
    assert "--overwrite true" in result.stderr


def test_two_processes_train_together_and_one_compresses(tmp_path):
    result = launch(
        "--num_processes", "2", "--multi_gpu", "recipes/run_image_classification.py", RECIPE,
        "--use_cpu", "true", "--output_dir", str(tmp_path / "run"), "--with_baseline", "false",
        *SHORT, ACCELERATE_USE_CPU="true",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    manifest = Manifest.load(tmp_path / "run" / "compressed")
    assert manifest.last("evaluate")["environment"]["hardware"]["processes"] == 2
    assert (tmp_path / "run" / "compressed" / "README.md").is_file()
