"""The float models of the studies: trained under a range restriction, and kept for all that compresses them."""

import copy
import tempfile
from pathlib import Path
from typing import Any

import torch
from examples import DATA, Examples
from results import Cell, digest
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, PreTrainedModel, set_seed

from hf_r2 import R2QuantizationConfig, R2Trainer, R2TrainingArguments, select_weights
from hf_r2.files import atomic_directory
from hf_r2.projection import clip_to_rms
from hf_r2.selection import output_first

KEPT_IN = Path("outputs/study")


def load_start(start: Cell) -> PreTrainedModel:
    """Load the float model of a specification, and train it first unless an earlier run has."""
    auto = AutoModelForCausalLM if start["data"] == "text" else AutoModelForImageClassification
    directory = KEPT_IN / digest(start)
    if not directory.exists():
        set_seed(start["seed"])
        model = auto.from_config(AutoConfig.for_model(**copy.deepcopy(start["model"])))
        candidate = dict(start["candidate"])
        clip_after = candidate.pop("clip_after", None)
        fit(model, DATA[start["data"]](start["split"])[0], start, candidate)
        if clip_after is not None:
            clip_weights(model, clip_after, start["grain"])
        with atomic_directory(directory) as scratch:
            model.save_pretrained(scratch)
    return auto.from_pretrained(directory)


def fit(
    model: nn.Module,
    train: Examples,
    spec: dict[str, Any],
    candidate: dict[str, Any],
    config: R2QuantizationConfig | None = None,
) -> None:
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
        R2Trainer(model=model, args=args, train_dataset=train, quantization_config=config).train()


@torch.no_grad()
def clip_weights(model: nn.Module, multiple: float, grain: str) -> None:
    for module, attribute in select_weights(model).values():
        weight = output_first(module, getattr(module, attribute))
        weight.copy_(clip_to_rms(weight, multiple, grain))
