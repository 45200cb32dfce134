"""One cell of the study: train a model under a range restriction, compress it, measure it."""

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache
from pydoc_data.topics import topics
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, ViTImageProcessor, set_seed

from hf_r2 import (
    R2QuantizationConfig,
    R2Trainer,
    R2TrainingArguments,
    decode,
    encode,
    select_weights,
    weight_statistics,
)
from hf_r2.evaluation import LabelledData
from hf_r2.evaluation.data import VALIDATION_FROM_TRAIN, to_pixels
from hf_r2.projection import clip_to_rms
from hf_r2.refine import batch_norms, reestimate_batch_norm
from hf_r2.selection import output_first

BATCH = 256
CONTEXT = 64
BITS = 2


class Examples(Dataset):
    """Tensors by input name, one row per example."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def __len__(self) -> int:
        return len(self.tensors["labels"])

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: tensor[index] for name, tensor in self.tensors.items()}

    def batches(self, size: int = BATCH, count: int | None = None) -> Iterator[dict[str, Tensor]]:
        """Cut the first examples, or all, into batches for evaluation."""
        for start in range(0, len(self) if count is None else min(count, len(self)), size):
            yield {name: tensor[start : start + size] for name, tensor in self.tensors.items()}


def run_cell(spec: dict[str, Any]) -> dict[str, Any]:
    """Train, compress and measure as a specification of `plan.cells` says; accuracies are shares of 1."""
    start = time.perf_counter()
    train, evaluation = DATA[spec["data"]](spec["split"])
    set_seed(spec["seed"])
    config = AutoConfig.for_model(**copy.deepcopy(spec["model"]))
    model = (AutoModelForCausalLM if spec["data"] == "text" else AutoModelForImageClassification).from_config(config)
    candidate = dict(spec["candidate"])
    clip_after = candidate.pop("clip_after", None)
    log = fit(model, train, spec, candidate)
    if clip_after is not None:
        transform_weights(model, lambda name, weight: clip_to_rms(weight, clip_after, spec["grain"]))

    config = quantization(spec, "min_max")
    statistics = [s for s in weight_statistics(model) if config.settings_for(s.name).bits == BITS]
    measured: dict[str, Any] = {
        "float": accuracy(model, evaluation),
        "train_loss": log[-1]["train_loss"],
        "crest_factor": sum(s.crest_factor for s in statistics) / len(statistics),
        "kurtosis": sum(s.kurtosis for s in statistics) / len(statistics),
    }
    for ranges in ("min_max", "mse"):
        compressed = copy.deepcopy(model)
        config = quantization(spec, ranges)
        transform_weights(compressed, lambda name, weight, c=config: decode(encode(weight, c, name)))
        measured[ranges] = accuracy(compressed, evaluation)
        if batch_norms(compressed):
            reestimate_batch_norm(compressed, ({"pixel_values": b["pixel_values"]} for b in train.batches()))
            measured[f"{ranges}_bn"] = accuracy(compressed, evaluation)
    if spec["data"] == "text":
        measured["bigram"] = bigram_accuracy(train, evaluation)
    return {**measured, "seconds": time.perf_counter() - start}


def fit(
    model: nn.Module,
    train: Examples,
    spec: dict[str, Any],
    candidate: dict[str, Any],
    config: R2QuantizationConfig | None = None,
) -> list[dict[str, float]]:
    """Train in place, with R2 as the candidate says; with a config, through compression, and compress in the end."""
    arguments = {"r2_mode": "none", "r2_grain": spec["grain"], **spec["training"], **candidate}
    with tempfile.TemporaryDirectory() as directory:
        args = R2TrainingArguments(
            output_dir=directory,
            seed=spec["seed"],
            max_grad_norm=1.0,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            remove_unused_columns=False,
            **arguments,
        )
        trainer = R2Trainer(model=model, args=args, train_dataset=train, quantization_config=config)
        trainer.train()
    return trainer.state.log_history


def quantization(spec: dict[str, Any], ranges: str) -> R2QuantizationConfig:
    return R2QuantizationConfig(
        method="uniform",
        bits=BITS,
        grain=spec["grain"],
        range=ranges,
        overrides={pattern: {"bits": 8} for pattern in spec["first_and_last"]},
    )


@torch.no_grad()
def transform_weights(model: nn.Module, transform: Callable[[str, Tensor], Tensor]) -> None:
    for name, (module, attribute) in select_weights(model).items():
        weight = output_first(module, getattr(module, attribute))
        weight.copy_(transform(name, weight))


@torch.no_grad()
def accuracy(model: nn.Module, data: Examples) -> float:
    """Share of right classes, or of right next bytes."""
    model.eval()
    right = total = 0
    for batch in data.batches():
        labels = batch.pop("labels")
        logits = model(**batch).logits
        if logits.dim() == 3:
            logits, labels = logits[:, :-1], labels[:, 1:]
        right += int((logits.argmax(dim=-1) == labels).sum())
        total += labels.numel()
    return right / total


@cache
def digits(split: str) -> tuple[Examples, Examples]:
    """Handwritten digits as the recipes use them, 32×32."""
    data = LabelledData("digits", VALIDATION_FROM_TRAIN if split == "validation" else split).load_with_training()
    processor = ViTImageProcessor(size={"height": 32, "width": 32}, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    parts = (to_pixels(processor, "image", "label")(part[:]) for part in data)
    return tuple(Examples(pixel_values=p["pixel_values"], labels=torch.tensor(p["labels"])) for p in parts)


@cache
def text(split: str) -> tuple[Examples, Examples]:
    """Python's own language reference, as every installation ships it, in bytes; split by topic, 8 : 1 : 1."""
    parts: dict[str, list[int]] = {"train": [], "validation": [], "test": []}
    for index, topic in enumerate(sorted(topics)):
        part = {8: "validation", 9: "test"}.get(index % 10, "train")
        parts[part] += topics[topic].encode()
    return tuple(_windows(parts[part]) for part in ("train", split))


def _windows(content: list[int]) -> Examples:
    whole = torch.tensor(content[: len(content) // CONTEXT * CONTEXT]).view(-1, CONTEXT)
    return Examples(input_ids=whole, labels=whole)


def bigram_accuracy(train: Examples, evaluation: Examples) -> float:
    """Return what knowing the last byte alone gives: the accuracy of its most frequent successor."""
    counts = torch.zeros(256, 256, dtype=torch.int64)
    for window in train.tensors["labels"]:
        counts.index_put_((window[:-1], window[1:]), torch.tensor(1), accumulate=True)
    labels = evaluation.tensors["labels"]
    return (counts.argmax(dim=1)[labels[:, :-1]] == labels[:, 1:]).float().mean().item()


DATA = {"digits": digits, "text": text}
