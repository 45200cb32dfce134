"""Make the golden checkpoint of format version 1. It is made once: later versions of the code must read the old files.

    python tests/golden/make_v1.py

Beside the checkpoint lies expected.safetensors, the state that it loads as.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig
from hf_r2.quantization import compress

DIRECTORY = Path(__file__).with_name("v1")
SETTINGS = {
    "method": "uniform",
    "bits": 4,
    "grain": "channel",
    "grid": "full",
    "overrides": {
        "resnet.embedder.embedder.convolution.weight": {"method": "palette", "bits": 8, "grain": "tensor"},
        # 36 inputs a channel: three groups of 10 and one of 6
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": {"bits": 4, "grain": 10, "symmetric": False},
        "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": {"bits": 3, "grid": "midrise"},
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight": {
            "bits": 2,
            "grain": "tensor",
            "grid": "restricted",
        },
        "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight": {"method": "palette", "bits": 1},
        "resnet.encoder.stages.1.layers.0.layer.1.convolution.weight": {"method": "palette", "bits": 3, "grain": 10},
    },
}


def main(directory: Path = DIRECTORY) -> None:
    """Write the checkpoint and the state that it loads as.

    Raises:
        SystemExit: if the directory exists.

    """
    if directory.exists():
        sys.exit(f"{directory} exists; a golden checkpoint is never made again")
    torch.manual_seed(1)
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    model = ResNetForImageClassification(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    compress(model, R2QuantizationConfig(**SETTINGS))
    model.save_pretrained(directory)
    save_file(model.state_dict(), directory / "expected.safetensors")


if __name__ == "__main__":
    main()
