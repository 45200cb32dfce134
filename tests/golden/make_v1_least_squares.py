"""Make the golden checkpoint of least-squares binary weights in format version 1. It is made once, as make_v1.py's.

    python tests/golden/make_v1_least_squares.py

Beside the checkpoint lies expected.safetensors, the state that it loads as.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig
from hf_r2.quantization import compress

DIRECTORY = Path(__file__).with_name("v1_least_squares")
SETTINGS = {
    "method": "least_squares",
    "bits": 2,
    "grain": "channel",
    "overrides": {
        "resnet.embedder.embedder.convolution.weight": {"bits": 8, "grain": "tensor"},
        # 36 inputs a channel: three groups of 10 and one of 6
        "resnet.encoder.stages.0.layers.0.layer.0.convolution.weight": {"bits": 3, "grain": 10},
        "resnet.encoder.stages.0.layers.0.layer.1.convolution.weight": {"basis": "ternary"},
        "resnet.encoder.stages.1.layers.0.shortcut.convolution.weight": {"bits": 1, "grain": "tensor"},
        "resnet.encoder.stages.1.layers.0.layer.0.convolution.weight": {"bits": 4, "basis": "greedy"},
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
    compress(model, R2QuantizationConfig(**SETTINGS))
    model.save_pretrained(directory)
    save_file(model.state_dict(), directory / "expected.safetensors")


if __name__ == "__main__":
    main()
