"""Every recipe's tiny version as its users launch it: alone, on two processes, and killed in the middle and resumed."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from hf_r2.report import Manifest

ROOT = Path(__file__).parents[2]
CONFIGS = Path("recipes/accelerate_configs")
TINY = sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("recipes/**/tiny.yaml"))
TIMEOUT = 600
"""Seconds."""

pytestmark = pytest.mark.slow

every_tiny = pytest.mark.parametrize("recipe", TINY, ids=lambda recipe: Path(recipe).parent.name)


def launch_line(recipe, output, *options, processes=1, config=None):
    """Take the launch line of a recipe's header, as its users do, on the CPU."""
    script = re.search(r"accelerate launch (recipes/run_\w+\.py) ", (ROOT / recipe).read_text()).group(1)
    config = CONFIGS / (config or ("cpu.yaml" if processes == 1 else "cpu_2proc.yaml"))
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", 0]
    return [*map(str, launcher), script, recipe, "--output_dir", str(output), "--use_cpu", "true", *options]


def start(command):
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def run(*arguments, **options):
    process = start(launch_line(*arguments, **options))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 0, output[-3000:]
    return output


def kill_when_there(path, *arguments, **options):
    """Start a run and kill all its processes as soon as a path exists."""
    process = start(launch_line(*arguments, **options))
    deadline = time.monotonic() + TIMEOUT
    while not path.exists():
        assert process.poll() is None, process.communicate()[0][-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    launcher = psutil.Process(process.pid)
    for member in [launcher, *launcher.children(recursive=True)]:  # workers have sessions of their own
        member.kill()
    process.communicate()


def results(output):
    """Return what a run leaves: weights by path, and the rows of its table."""
    weights = {str(path.relative_to(output)): path.read_bytes() for path in sorted(output.glob("**/model.safetensors"))}
    assert "compressed/model.safetensors" in weights
    finished = {name: content for name, content in weights.items() if "checkpoint-" not in name}
    return finished, Manifest.load(output / "compressed").last("evaluate")["rows"]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Run each recipe once, however many tests ask for it."""
    runs = {}

    def result(recipe, processes=1):
        if (recipe, processes) not in runs:
            runs[recipe, processes] = tmp_path_factory.mktemp("whole") / "run"
            run(recipe, runs[recipe, processes], processes=processes)
        return runs[recipe, processes]

    return result


@every_tiny
def test_recipe_ends_with_a_checkpoint_and_its_card(uninterrupted, recipe):
    compressed = uninterrupted(recipe) / "compressed"
    assert {"README.md", "config.json", "manifest.json", "model.safetensors", "weights.png"} <= set(
        os.listdir(compressed)
    )
    assert all(row["bytes"] > 0 for row in results(compressed.parent)[1])


@every_tiny
def test_recipe_runs_on_two_processes(uninterrupted, recipe):
    manifest = Manifest.load(uninterrupted(recipe, processes=2) / "compressed")
    assert manifest.last("evaluate")["environment"]["hardware"]["processes"] == 2


@every_tiny
def test_killed_and_resumed_equals_uninterrupted(uninterrupted, recipe, tmp_path):
    whole = uninterrupted(recipe)
    run_dir = tmp_path / "run"
    kill_when_there(run_dir / "checkpoint-6", recipe, run_dir)
    run(recipe, run_dir, "--resume", "true")
    assert results(run_dir) == results(whole)


@pytest.mark.parametrize(
    "moment", ["baseline/checkpoint-3/trainer_state.json", "baseline/float", "float", "compressed"]
)
def test_a_run_can_be_killed_at_any_moment(uninterrupted, moment, tmp_path):
    recipe = "recipes/vision/resnet18/tiny.yaml"
    run_dir = tmp_path / "run"
    kill_when_there(run_dir / moment, recipe, run_dir)
    run(recipe, run_dir, "--resume", "true")
    assert results(run_dir) == results(uninterrupted(recipe))
    assert "holds the whole run already" in run(recipe, run_dir, "--resume", "true")


def test_two_processes_are_killed_and_resumed(uninterrupted, tmp_path):
    recipe = "recipes/vision/resnet18/tiny.yaml"
    run_dir = tmp_path / "run"
    kill_when_there(run_dir / "checkpoint-6", recipe, run_dir, processes=2)
    run(recipe, run_dir, "--resume", "true", processes=2)
    assert results(run_dir) == results(uninterrupted(recipe, processes=2))


def test_a_language_model_trains_cut_over_two_processes(tmp_path):
    run("recipes/language/llama_wikitext/tiny.yaml", tmp_path / "run", processes=2, config="fsdp2.yaml")
    finished, rows = results(tmp_path / "run")
    assert "float/model.safetensors" in finished
    assert all(row["perplexity"] < 1000 for row in rows)


def test_another_recipe_is_not_resumed(uninterrupted):
    recipe = "recipes/vision/resnet18/tiny.yaml"
    run_dir = uninterrupted(recipe)
    process = start(launch_line(recipe, run_dir, "--resume", "true", "--seed", "1"))
    output, _ = process.communicate(timeout=TIMEOUT)
    assert process.returncode != 0
    assert "had other values of seed" in output
    assert json.loads((run_dir / "run.json").read_text())["seed"] == 0
