"""Float and compressed checkpoints of tiny models, made once."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_models import build, load

from hf_r2 import R2QuantizationConfig


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Sum in one order, so that logits are comparable bit by bit across processes."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def float_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the directory of a family's float checkpoint."""
    root = tmp_path_factory.mktemp("float")

    def directory(family: str) -> Path:
        if not (root / family).exists():
            build(family).save_pretrained(root / family)
        return root / family

    return directory


@pytest.fixture(scope="session")
def compressed_checkpoint(
    tmp_path_factory: pytest.TempPathFactory, float_checkpoint: Callable[[str], Path]
) -> Callable[..., Path]:
    """Return the directory of a family's checkpoint compressed with these settings; not to be written into."""
    made: dict[str, Path] = {}

    def directory(family: str, **settings: Any) -> Path:
        key = json.dumps([family, settings])
        if key not in made:
            made[key] = tmp_path_factory.mktemp(f"{family}-compressed")
            model = load(family, float_checkpoint(family), quantization_config=R2QuantizationConfig(**settings))
            model.save_pretrained(made[key])
        return made[key]

    return directory
