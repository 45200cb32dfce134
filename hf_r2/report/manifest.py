"""The manifest: what every stage did and measured, from which cards, tables and plots are rendered."""

import importlib.metadata
import json
import math
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hf_r2.files import atomic_write

MANIFEST_NAME = "manifest.json"
MANIFEST_VERSION = 1
_PACKAGES = ("hf_r2", "torch", "transformers", "accelerate", "datasets", "optimum", "evaluate", "safetensors")


class Manifest:
    """An ordered record of stages, each a dict of plain JSON values.

    Args:
        stages: stages so far.
    """

    def __init__(self, stages: list[dict[str, Any]] | None = None) -> None:
        self.stages = list(stages or [])

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> "Manifest":
        """Read the manifest of a checkpoint directory; empty if it has none.

        Raises:
            ValueError: if the file is not a manifest that this version reads.
        """
        path = Path(directory) / MANIFEST_NAME
        if not path.is_file():
            return cls()
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            version, stages = content["manifest_version"], content["stages"]
            if not isinstance(stages, list) or not all("stage" in dict(entry) for entry in stages):
                raise TypeError("its stages are not a list of stages")
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not an hf_r2 manifest ({error}); delete it or restore it") from error
        if version != MANIFEST_VERSION:
            raise ValueError(f"{path} has version {version}, this hf_r2 reads {MANIFEST_VERSION}; upgrade hf_r2")
        return cls(stages)

    def add(self, stage: str, **facts: Any) -> dict[str, Any]:
        """Append a stage with the time, the environment and the facts given, and return it."""
        entry = {
            "stage": stage,
            "finished": datetime.now(UTC).isoformat(timespec="seconds"),
            "environment": environment(),
            **facts,
        }
        self.stages.append(_plain(entry))
        return self.stages[-1]

    def last(self, stage: str) -> dict[str, Any]:
        """Return the newest stage of this name; empty if there is none."""
        return next((entry for entry in reversed(self.stages) if entry["stage"] == stage), {})

    def save(self, directory: str | os.PathLike[str]) -> Path:
        """Write the manifest into a checkpoint directory and return its path."""
        path = Path(directory) / MANIFEST_NAME
        content = {"manifest_version": MANIFEST_VERSION, "stages": self.stages}
        atomic_write(path, json.dumps(content, indent=1, allow_nan=False, ensure_ascii=False) + "\n")
        return path


def environment() -> dict[str, Any]:
    """Describe the run: command, git commit, versions and hardware."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "command": command_line(sys.argv),
        "git_commit": _git_commit(),
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "cpus": os.cpu_count(),
            "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "processes": int(os.environ.get("WORLD_SIZE", 1)),
        },
    }


def command_line(argv: list[str]) -> str:
    """Join a command as a shell would read it: with its launcher, without the values of token options."""
    program = Path(argv[0])
    if program.suffix == ".py":
        launched = {"ACCELERATE_MIXED_PRECISION": ["accelerate", "launch"], "TORCHELASTIC_RUN_ID": ["torchrun"]}
        shown = next((words for variable, words in launched.items() if variable in os.environ), ["python"])
        shown = [*shown, os.path.relpath(program)]
    else:
        shown = [program.name]
    hide = False
    for argument in argv[1:]:
        option, equals, _ = argument.partition("=")
        secret = option.startswith("--") and option.endswith("token")
        shown.append("***" if hide else f"{option}=***" if secret and equals else argument)
        hide = secret and not equals
    return shlex.join(shown)


def _git_commit() -> str | None:
    """Commit of the working directory's repository, with `-dirty` if tracked files differ; None outside one."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return described.stdout.strip() if described.returncode == 0 else None


def _plain(value: Any) -> Any:
    """Turn facts into JSON values; a number that is not finite becomes None, as JSON has no word for it."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic | torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | int | bool):
        return value
    return str(value)
