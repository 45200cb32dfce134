"""One cell of the study: a float model, or what a compression makes of it, measured."""

import math
import time

from compressions import compressed
from examples import DATA, accuracy, bigram_accuracy
from float_models import load_start
from results import Cell, start_of
from torch import nn
from transformers import set_seed

from hf_r2 import R2QuantizationConfig, weight_statistics
from hf_r2.refine import batch_norms, reestimate_batch_norm


def measure_float(model: nn.Module, spec: Cell) -> dict[str, float]:
    """Measure a float model: its accuracy, a share of 1, and its weights but for those of the first and last layer."""
    start = time.perf_counter()
    train, evaluation = DATA[spec["data"]](spec["split"])
    kept = R2QuantizationConfig(overrides={pattern: {"bits": 8} for pattern in spec["first_and_last"]})
    weights = [s for s in weight_statistics(model) if kept.settings_for(s.name).bits != 8]
    measured = {
        "accuracy": accuracy(model, evaluation),
        "weight_bytes": sum(4 * math.prod(s.shape) for s in weight_statistics(model)),
        "crest_factor": sum(s.crest_factor for s in weights) / len(weights),
        "kurtosis": sum(s.kurtosis for s in weights) / len(weights),
    }
    if spec["data"] == "text":
        measured["bigram"] = bigram_accuracy(train, evaluation)
    return {**measured, "seconds": time.perf_counter() - start}


def measure_compressed(model: nn.Module, spec: Cell) -> dict[str, float]:
    """Compress a float model in place and measure it, as it is and with batch norm re-estimated without labels."""
    start = time.perf_counter()
    train, evaluation = DATA[spec["data"]](spec["split"])
    set_seed(spec["seed"])
    model, nbytes = compressed(model, spec, train)
    measured = {"accuracy": accuracy(model, evaluation), "weight_bytes": nbytes}
    if batch_norms(model):
        reestimate_batch_norm(model, train.images())
        measured["accuracy_bn"] = accuracy(model, evaluation)
    return {**measured, "seconds": time.perf_counter() - start}


def run_cell(spec: Cell) -> dict[str, float]:
    """Run a cell that `plan` specifies."""
    return (measure_compressed if spec["compression"] else measure_float)(load_start(start_of(spec)), spec)
