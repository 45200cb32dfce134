"""Tiny float checkpoints to plan for, and data for them."""

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
)

_TRANSFORMER = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
MODELS = {
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**_TRANSFORMER, vocab_size=32, max_position_embeddings=16, num_labels=3)
    ),
    # Its output layer is tied to the embedding
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    ),
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=3)
    ),
    # transformers gives its tensors other names in files
    "vit": lambda: ViTForImageClassification(ViTConfig(**_TRANSFORMER, image_size=8, patch_size=4, num_labels=3)),
}


def save(name, directory, **options):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(directory, **options)
    return str(directory)


def images(labelled=True):
    """Two batches of images, with classes that alternate."""
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(16, 3, 32, 32, generator=generator)
    labels = {"labels": torch.arange(16) % 3} if labelled else {}
    batch = {"pixel_values": pixels, **labels}
    return [{key: value[start : start + 8] for key, value in batch.items()} for start in (0, 8)]
