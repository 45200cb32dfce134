"""Small random models of the architectures that can be equalized, whose batch-norm statistics are true."""

import torch
from torch import nn
from transformers import (
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    MobileNetV2Config,
    MobileNetV2ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_r2.refine import reestimate_batch_norm

RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "num_labels": 3}
MODELS = {
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, layer_type="basic")),
    "resnet_bottleneck": lambda: ResNetForImageClassification(ResNetConfig(**RESNET, layer_type="bottleneck")),
    "mobilenet_v1": lambda: MobileNetV1ForImageClassification(
        MobileNetV1Config(depth_multiplier=0.0625, min_depth=4, image_size=32, num_labels=3)
    ),
    "mobilenet_v2": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(depth_multiplier=0.125, min_depth=4, depth_divisible_by=4, expand_ratio=2, num_labels=3)
    ),
    "mobilenet_v2_stem": lambda: MobileNetV2ForImageClassification(
        MobileNetV2Config(
            depth_multiplier=0.125, min_depth=4, depth_divisible_by=4, first_layer_is_expansion=False, num_labels=3
        )
    ),
}


def images(seed=0, count=3, size=6):
    generator = torch.Generator().manual_seed(seed)
    return [{"pixel_values": torch.randn(size, 3, 32, 32, generator=generator)} for _ in range(count)]


def build(family, high_bias=False):
    """Build a model; on the images of seed 1 its activations stay below 6, and high biases are far above 0."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.05, 0.2)
            nn.init.normal_(module.bias, 1.5 if high_bias else 0.2, 0.5)
        elif isinstance(module, nn.Conv2d):
            # Channels of very different ranges, as equalization meets them
            nn.init.kaiming_normal_(module.weight)
            module.weight.data.mul_(torch.exp(torch.randn(len(module.weight))).view(-1, 1, 1, 1))
    reestimate_batch_norm(model, images(1))
    return model.requires_grad_(False)


@torch.no_grad()
def logits(model):
    dtype = next(model.parameters()).dtype
    return model(images(1, 1)[0]["pixel_values"].to(dtype)).logits
