import json
import re

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from launches import CONFIGS, launch

pytestmark = pytest.mark.slow

ROOT = CONFIGS.parents[1]
PROCESSES = {"cpu": 1, "cpu_2proc": 2, "single_gpu": 1, "ddp": 2, "fsdp2": 2}
FSDP2 = {
    "version": 2,
    "wrap": "transformer_auto_wrap_policy",
    "reshard_after_forward": True,
    "state_dict_type": "FULL_STATE_DICT",
    "cpu_ram_efficient_loading": True,
}

every_config = pytest.mark.parametrize("name", [*PROCESSES, "zero2"])


def test_every_config_is_tested():
    assert {path.stem for path in CONFIGS.iterdir()} == {*PROCESSES, "zero2"}


@pytest.mark.parametrize("name", PROCESSES)
def test_config_starts_its_processes(tmp_path, name):
    launch("config_run.py", tmp_path, config=name, processes=PROCESSES[name])
    expected = {"processes": PROCESSES[name], "device": "cpu", **(FSDP2 if name == "fsdp2" else {})}
    found = {path.name: json.loads(path.read_text()) for path in tmp_path.iterdir()}
    assert found == {f"{rank}.json": expected for rank in range(PROCESSES[name])}


@every_config
def test_header_has_a_launch_line_of_files_that_exist(name):
    text = (CONFIGS / f"{name}.yaml").read_text()
    header = " ".join(line.strip("# \\") for line in text.splitlines() if line.startswith("#"))
    launch_lines = re.findall(r"accelerate launch --config_file (\S+).*? (\S+\.py) ", header)
    assert launch_lines
    for config, script in launch_lines:
        assert ROOT / config == CONFIGS / f"{name}.yaml"
        assert (ROOT / script).is_file()


@every_config
def test_precision_and_steps_are_left_to_the_training_arguments(name):
    config = load_config_from_file(str(CONFIGS / f"{name}.yaml"))
    assert config.mixed_precision == "no"
    assert not {"gradient_accumulation_steps", "gradient_clipping"} & config.deepspeed_config.keys()


def test_deepspeed_cuts_no_weights():
    config = load_config_from_file(str(CONFIGS / "zero2.yaml"))
    assert config.distributed_type == "DEEPSPEED"
    assert config.deepspeed_config["zero_stage"] == 2
