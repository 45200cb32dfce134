"""Compressed checkpoints of tiny models, made once."""

import json

import pytest
from export_models import IMAGES, build
from transformers import ConvNextImageProcessorPil

from hf_r2 import R2QuantizationConfig
from hf_r2.quantization import compress


@pytest.fixture(scope="session")
def compressed_checkpoint(tmp_path_factory):
    """Return the directory of a family's checkpoint compressed with these settings, with an image processor."""
    made = {}

    def directory(family, **settings):
        key = json.dumps([family, settings])
        if key not in made:
            made[key] = tmp_path_factory.mktemp(family)
            model = compress(build(family), R2QuantizationConfig(**settings))
            model.save_pretrained(made[key])
            if family in IMAGES:
                size = {"shortest_edge": 32}
                ConvNextImageProcessorPil(size=size, crop_pct=1.0).save_pretrained(made[key])
        return made[key]

    return directory
