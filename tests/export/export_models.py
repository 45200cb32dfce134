"""Tiny random models of every kind that is exported, and weights of every codec and grain."""

import itertools

import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MobileNetV1Config,
    MobileNetV1ForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

from hf_r2 import select_weights
from hf_r2.codecs import CodecSettings, encode

WORDS, PLACES = 32, 16
_SIZES = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
_RESNET = {"embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic", "num_labels": 3}
_GPT2 = {"n_positions": PLACES, "n_embd": 8, "n_layer": 1, "n_head": 2, "bos_token_id": 0, "eos_token_id": 0}
MODELS = {
    "resnet": lambda: ResNetForImageClassification(ResNetConfig(**_RESNET)),
    "mobilenet_v1": lambda: MobileNetV1ForImageClassification(
        MobileNetV1Config(depth_multiplier=0.03125, min_depth=4, image_size=32, num_labels=3)
    ),
    "vit": lambda: ViTForImageClassification(ViTConfig(**_SIZES, image_size=32, patch_size=16, num_labels=3)),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**_SIZES, vocab_size=WORDS, max_position_embeddings=PLACES, num_labels=3)
    ),
    # transformers' Conv1D, and an output layer tied to the embedding
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(vocab_size=WORDS, **_GPT2)),
    "llama": lambda: LlamaForCausalLM(
        LlamaConfig(**_SIZES, vocab_size=WORDS, num_key_value_heads=1, max_position_embeddings=PLACES)
    ),
}
IMAGES = ("resnet", "mobilenet_v1", "vit")

CODECS = {
    "restricted_2": {"method": "uniform", "bits": 2},
    "restricted_8": {"method": "uniform", "bits": 8},
    "full_3": {"method": "uniform", "bits": 3, "grid": "full"},
    "full_4": {"method": "uniform", "bits": 4, "grid": "full"},
    "affine_4": {"method": "uniform", "bits": 4, "symmetric": False},
    "affine_5": {"method": "uniform", "bits": 5, "symmetric": False},
    "midrise_1": {"method": "uniform", "bits": 1, "grid": "midrise"},
    "midrise_3": {"method": "uniform", "bits": 3, "grid": "midrise"},
    "palette_1": {"method": "palette", "bits": 1},
    "palette_2": {"method": "palette", "bits": 2},
    "palette_4": {"method": "palette", "bits": 4},
    "palette_7": {"method": "palette", "bits": 7},
    "vectors": {"method": "palette", "bits": 4, "cluster_dim": 2},
    "least_squares_1": {"method": "least_squares", "bits": 1},
    "least_squares_2": {"method": "least_squares", "bits": 2},
}
GRAINS = ("tensor", "channel", 5)  # 5 divides the inputs of none of the weights below
SHAPES = {"linear": (6, 13), "conv": (4, 3, 3, 3)}


def build(family):
    """Build a model whose parameters and statistics all differ."""
    torch.manual_seed(0)
    model = MODELS[family]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
    return model


def mixed(family):
    """Give the weights of a family, embeddings of texts included, every codec and grain in turn."""
    include = None if family in IMAGES else ["*"]
    weights = select_weights(build(family), include=include)
    variants = itertools.cycle([{**codec, "grain": grain} for grain in GRAINS for codec in CODECS.values()])
    return {"include": include, "overrides": dict(zip(weights, variants, strict=False))}


def batch(family, examples=3, length=7):
    """Make inputs by name; texts are padded to different lengths."""
    generator = torch.Generator().manual_seed(1)
    if family in IMAGES:
        return {"pixel_values": torch.randn(examples, 3, 32, 32, generator=generator)}
    words = torch.randint(1, WORDS, (examples, length), generator=generator)
    mask = torch.ones_like(words)
    mask[0, -2:] = 0
    types = {"token_type_ids": (torch.arange(length) > 2).long().expand(examples, -1).contiguous()}
    return {"input_ids": words, "attention_mask": mask, **(types if family == "bert" else {})}


@torch.no_grad()
def logits(model, inputs):
    """Compute logits, of places that are no padding."""
    found = model(**inputs).logits
    return found if found.dim() == 2 else found[inputs["attention_mask"].bool()]


def encoded_weight(codec, grain, kind="linear"):
    weight = torch.randn(SHAPES[kind], generator=torch.Generator().manual_seed(2))
    return encode(weight, CodecSettings(**CODECS[codec], grain=grain))
