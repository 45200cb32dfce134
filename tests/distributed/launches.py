"""Scripts of this directory, launched as users launch theirs, but on two CPU cores."""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CONFIGS = HERE.parents[1] / "recipes" / "accelerate_configs"
TIMEOUT = 300
"""Seconds."""


def launch(script, *arguments, config="ddp", processes=2):
    """Run a script with one of the accelerate configs that are shipped; return its standard output."""
    options = ["--config_file", CONFIGS / f"{config}.yaml", "--num_processes", processes, "--main_process_port", 0]
    command = [sys.executable, "-m", "accelerate.commands.launch", *options, HERE / script, *arguments]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent / "training"), os.environ.get("PYTHONPATH", "")]),
        "TOKENIZERS_PARALLELISM": "false",
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(list(map(str, command)), env=environment, **pipes) as process:
        try:
            output, errors = process.communicate(timeout=TIMEOUT)
        except subprocess.TimeoutExpired:
            # The launcher ends its processes then, which killing it would not
            process.terminate()
            raise
    assert process.returncode == 0, errors[max(errors.find("Traceback"), 0) :][:4000]
    return output
