"""Tiny random models of every layer type that is compressed, and what the checkpoint tests do with them."""

import itertools
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForAudioClassification,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoModelForVideoClassification,
    BertConfig,
    Data2VecAudioConfig,
    GPT2Config,
    MobileNetV1Config,
    PretrainedConfig,
    PreTrainedModel,
    RegNetConfig,
    ResNetConfig,
    VideoMAEConfig,
    ViTConfig,
)

from hf_r2.selection import output_first, select_weights


@dataclass(frozen=True)
class Family:
    """One architecture: how it is configured, which auto class loads it, and the shape of its input."""

    config: Callable[[], PretrainedConfig]
    auto_class: Any
    input_name: str
    input_shape: tuple[int, ...]


CODECS: dict[str, dict[str, Any]] = {
    "restricted": {"method": "uniform", "bits": 2},
    "least_squares": {"method": "least_squares", "bits": 3},
    "midrise": {"method": "uniform", "bits": 2, "grid": "midrise"},
    "affine": {"method": "uniform", "bits": 4, "symmetric": False},
    "palette": {"method": "palette", "bits": 3},
    "vectors": {"method": "palette", "bits": 4, "cluster_dim": 3},
    "searched_range": {"method": "uniform", "bits": 5, "range": "mse"},
    "full": {"method": "uniform", "bits": 3, "grid": "full"},
    "two_scales": {"method": "least_squares", "bits": 2},
    "greedy": {"method": "least_squares", "bits": 3, "basis": "greedy"},
    "ternary": {"method": "least_squares", "bits": 2, "basis": "ternary"},
    "signs": {"method": "uniform", "bits": 1, "grid": "midrise"},
    "percentile": {"method": "uniform", "bits": 4, "range": "percentile", "percentile": 95.0},
}
GRAINS: tuple[str | int, ...] = ("tensor", "channel", 5)

_TRANSFORMER = {
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
}
_PATCHES = {**_TRANSFORMER, "image_size": 8, "patch_size": 4}
_VOCABULARY = 32

FAMILIES = {
    "resnet": Family(
        lambda: ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3),
        AutoModelForImageClassification,
        "pixel_values",
        (2, 3, 32, 32),
    ),
    # Convolutions in groups of two channels
    "regnet": Family(
        lambda: RegNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], groups_width=2, num_labels=3),
        AutoModelForImageClassification,
        "pixel_values",
        (2, 3, 32, 32),
    ),
    # Depthwise convolutions
    "mobilenet_v1": Family(
        lambda: MobileNetV1Config(depth_multiplier=0.03125, min_depth=4, image_size=32, num_labels=3),
        AutoModelForImageClassification,
        "pixel_values",
        (2, 3, 32, 32),
    ),
    "vit": Family(
        lambda: ViTConfig(**_PATCHES, num_labels=3), AutoModelForImageClassification, "pixel_values", (2, 3, 8, 8)
    ),
    # Conv3d
    "videomae": Family(
        lambda: VideoMAEConfig(**_PATCHES, num_frames=4, tubelet_size=2, num_labels=3),
        AutoModelForVideoClassification,
        "pixel_values",
        (2, 4, 3, 8, 8),
    ),
    # Conv1d, plain and in groups
    "data2vec_audio": Family(
        lambda: Data2VecAudioConfig(
            **_TRANSFORMER,
            conv_dim=(8, 8),
            conv_stride=(5, 2),
            conv_kernel=(10, 3),
            num_conv_pos_embeddings=1,
            num_conv_pos_embedding_groups=2,
            conv_pos_kernel_size=3,
            classifier_proj_size=8,
            num_labels=3,
        ),
        AutoModelForAudioClassification,
        "input_values",
        (2, 400),
    ),
    "bert": Family(
        lambda: BertConfig(**_TRANSFORMER, vocab_size=_VOCABULARY, max_position_embeddings=16, num_labels=3),
        AutoModelForSequenceClassification,
        "input_ids",
        (2, 10),
    ),
    # transformers' Conv1D, and an output layer tied to the embedding
    "gpt2": Family(
        lambda: GPT2Config(vocab_size=_VOCABULARY, n_positions=16, n_embd=8, n_layer=1, n_head=2),
        AutoModelForCausalLM,
        "input_ids",
        (2, 10),
    ),
}


def mixed(family: str) -> dict[str, Any]:
    """Settings that give the weights of a family every codec and grain in turn."""
    variants = itertools.cycle([{**codec, "grain": grain} for grain in GRAINS for codec in CODECS.values()])
    return {"overrides": dict(zip(selected(build(family)), variants, strict=False))}


def random_model(config: PretrainedConfig, auto_class: Any, seed: int = 0) -> PreTrainedModel:
    """Build a model whose every parameter and buffer differs from what initialization would make of it."""
    torch.manual_seed(seed)
    model = auto_class.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(std=0.1)
                module.running_var.uniform_(0.5, 1.5)
                module.num_batches_tracked.fill_(7)
    return model


def build(family: str, seed: int = 0) -> PreTrainedModel:
    """Build the tiny float model of a family."""
    return random_model(FAMILIES[family].config(), FAMILIES[family].auto_class, seed)


def load(family: str, directory: Path, **kwargs: Any) -> PreTrainedModel:
    """Load a checkpoint through the family's auto class."""
    return FAMILIES[family].auto_class.from_pretrained(directory, **kwargs)


def inputs(family: str) -> dict[str, Tensor]:
    """Return the same inputs at every call."""
    name, shape = FAMILIES[family].input_name, FAMILIES[family].input_shape
    generator = torch.Generator().manual_seed(1)
    if name == "input_ids":
        return {name: torch.randint(1, _VOCABULARY, shape, generator=generator)}
    return {name: torch.randn(shape, generator=generator)}


@torch.no_grad()
def logits(model: PreTrainedModel, family: str) -> Tensor:
    """Run a model on the family's inputs, in the model's dtype."""
    batch = {name: x.to(model.dtype) if x.is_floating_point() else x for name, x in inputs(family).items()}
    result = model(**batch).logits
    assert torch.isfinite(result).all()
    return result


def selected(model: nn.Module, **selection: Any) -> dict[str, Tensor]:
    """Clone the selected weights of a model, output channels first."""
    weights = select_weights(model, **selection).items()
    return {name: output_first(module, module.weight).detach().clone() for name, (module, _) in weights}


def state(model: nn.Module) -> dict[str, Tensor]:
    """Clone the state of a model."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def assert_same_tensors(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that two mappings hold the same names, dtypes and bits."""
    assert actual.keys() == expected.keys()
    pairs = {name: (actual[name], expected[name]) for name in expected}
    assert not [
        name for name, (left, right) in pairs.items() if left.dtype != right.dtype or not torch.equal(left, right)
    ]


def run_python(code: str, *arguments: object) -> str:
    """Run code in a process of its own and return what it printed."""
    done = subprocess.run(
        python_command(code, *arguments),
        capture_output=True,
        text=True,
        timeout=300,
        env=python_environment(),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python_command(code: str, *arguments: object) -> list[str]:
    """Return the command line that runs code with arguments."""
    return [sys.executable, "-c", code, *map(str, arguments)]


def python_environment() -> dict[str, str]:
    """Return an environment that computes as the tests do, on one thread, and stays off the network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
