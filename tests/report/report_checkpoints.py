"""Tiny checkpoints for range reports."""

import torch
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.report import Manifest


def save_checkpoints(directory):
    """Save a baseline, a float model with curves and the same compressed; return their paths."""
    paths = [directory / name for name in ("baseline", "float", "compressed")]
    for seed, path in enumerate(paths[:2]):
        torch.manual_seed(seed)
        config = ResNetConfig(embedding_size=4, hidden_sizes=[4], depths=[1], layer_type="basic", num_labels=3)
        ResNetForImageClassification(config).save_pretrained(path)
    manifest = Manifest()
    history = [{"loss": 2.0 / step, "crest_factor": 3.0 - 0.1 * step, "step": step} for step in (1, 2, 3)]
    manifest.add("train", log_history=history)
    manifest.save(paths[1])
    R2Quantizer.from_pretrained(paths[1]).quantize(paths[2], R2QuantizationConfig("palette", bits=2, grain="tensor"))
    return [str(path) for path in paths]
