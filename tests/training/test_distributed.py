import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_cases import MODELS, assert_close, assert_same, logged, make_data, snapshot

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("distributed_run.py")
WARNING = "number of items"


@pytest.fixture
def launch(new_dir):
    """Runs a training, or an evaluation alone, in two processes; returns its directory and their standard error."""

    def run(name, examples, train=True, **arguments):
        output_dir = new_dir()
        settings = json.dumps({"name": name, "examples": examples, "train": train, "arguments": arguments})
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT, output_dir, settings]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            env=environment,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        return output_dir, done.stderr

    return run


def result(directory, rank=0):
    return json.loads((directory / f"result-{rank}.json").read_text())


def values(directory, key):
    return [entry[key] for entry in result(directory)["logs"] if "loss" in entry]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("loss", ["l_inf", "margin"])
@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_processes_train_as_one(train, launch, name, loss, accumulation):
    options = {"r2_loss": loss, "r2_strength": 0.1, "r2_learning_rate": 0.1, "num_train_epochs": 2}
    data = make_data(name, 32)
    alone = train(MODELS[name](), data, per_device_train_batch_size=8, **options)
    directory, _ = launch(
        name,
        32,
        per_device_train_batch_size=4 // accumulation,
        gradient_accumulation_steps=accumulation,
        **options,
    )
    assert [result(directory, rank)["processes"] for rank in range(2)] == [2, 2]
    assert len(values(directory, "loss")) == len(logged(alone)) == 8
    for key in ("loss", "task_loss", "r2_loss", "crest_factor"):
        assert values(directory, key) == pytest.approx(logged(alone, key), abs=1e-5)
    assert result(directory)["eval_loss"] == pytest.approx(alone.evaluate(data)["eval_loss"], abs=1e-5)
    assert_close(load_file(directory / "weights-0.safetensors"), snapshot(alone.model))
    assert_close(load_file(directory / "learnable-0.safetensors"), snapshot(alone.range_loss))
    for kind in ("weights", "learnable"):
        assert_same(*(load_file(directory / f"{kind}-{rank}.safetensors") for rank in range(2)))


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_two_processes_evaluate_an_untrained_model_as_one(make_trainer, launch, name):
    data = make_data(name, 16)
    alone = make_trainer(MODELS[name](), data, r2_strength=0.1).evaluate(data)
    directory, _ = launch(name, 16, train=False, r2_strength=0.1, per_device_train_batch_size=4)
    assert result(directory)["eval_loss"] == pytest.approx(alone["eval_loss"], abs=1e-5)


def test_two_processes_warn_once(launch):
    _, errors = launch("bert", 16, r2_strength=0.1, per_device_train_batch_size=4)
    assert errors.count(WARNING) == 1
