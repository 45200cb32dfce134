"""What the files of a checkpoint say about the range of its weights: the figures of a range report."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import numpy as np
from torch import Tensor
from transformers.utils import cached_file

from hf_r2.report.histogram import histogram
from hf_r2.report.inspection import StoredWeight
from hf_r2.report.manifest import MANIFEST_NAME, Manifest
from hf_r2.report.statistics import WeightStatistics, tensor_statistics

CURVES = {
    "loss": "training loss",
    "task_loss": "task loss",
    "r2_loss": "R2 term",
    "distillation_loss": "distillation loss",
    "eval_loss": "evaluation loss",
    "eval_accuracy": "evaluation accuracy",
    "crest_factor": "crest factor, mean of weights",
    "kurtosis": "kurtosis, mean of weights",
    "r2_strength": "R2 strength",
    "learning_rate": "learning rate",
}
"""What a Trainer logs, and its heading, in the order of a report."""

Curve = list[tuple[float, float]]


@dataclass(frozen=True)
class FloatFacts:
    """What a manifest says about the float weight that a compressed one was made from.

    Args:
        rms: of the float weight.
        crest_factor: of the float weight.
        kurtosis: of the float weight.
        sqnr: of the float weight under uniform quantization, in dB by bits; see [`WeightStatistics`].
        compressed_sqnr: SQNR in dB of the weight as it was compressed.
    """

    rms: float
    crest_factor: float
    kurtosis: float
    sqnr: dict[int, float]
    compressed_sqnr: float


@dataclass(frozen=True)
class WeightRange:
    """The range of one weight.

    Args:
        statistics: of the weight as it is stored; of a compressed one, decoded.
        storage: how it is stored, such as `"float32"` or `"palette 2-bit"`.
        compressed: whether it is compressed.
        bits_per_weight: bits that it takes in the file.
        counts: its [`histogram`], in units of its rms, or of its float weight's where that is known.
        before: what is known about its float weight; None for a float weight, and without a manifest.
    """

    statistics: WeightStatistics
    storage: str
    compressed: bool
    bits_per_weight: float
    counts: np.ndarray
    before: FloatFacts | None

    @property
    def sqnr(self) -> dict[int, float]:
        """SQNR in dB by bits, of the float weight; empty where nothing is known about it.

        A compressed weight has few values, and would flatter itself.
        """
        if self.before is not None:
            return self.before.sqnr
        return {} if self.compressed else self.statistics.sqnr


@dataclass(frozen=True)
class CheckpointRanges:
    """The ranges of a checkpoint's weights, and the curves of its training.

    Args:
        label: what the report calls it.
        weights: by name.
        curves: steps and values by name, of those in `CURVES` that its manifest holds.
    """

    label: str
    weights: Mapping[str, WeightRange]
    curves: Mapping[str, Curve]


def measure_ranges(
    source: str, label: str, weights: Sequence[StoredWeight], progress: Callable[[], object]
) -> CheckpointRanges:
    """Measure the weights of a checkpoint one after another: memory follows the largest.

    Args:
        source: directory or Hub name.
        label: what the report calls it.
        weights: of [`stored_weights`].
        progress: called after every weight.

    Raises:
        ValueError: for weights with NaN or infinite values, damaged files and a manifest that is none.
    """
    manifest = read_manifest(source)
    facts, curves = float_facts(manifest, source), training_curves(manifest, source)
    ranges = {}
    for weight in weights:
        ranges[weight.name] = _measure(weight, weight.read(), facts.get(weight.name))
        progress()
    return CheckpointRanges(label, ranges, curves)


def _measure(stored: StoredWeight, weight: Tensor, before: FloatFacts | None) -> WeightRange:
    statistics = tensor_statistics(stored.name, weight)
    counts = histogram(weight, statistics.rms if before is None else before.rms)
    return WeightRange(statistics, stored.storage, stored.compressed, stored.bits_per_weight, counts, before)


def read_manifest(source: str) -> Manifest:
    """Read the manifest of a checkpoint in a directory or on the Hub; empty if it has none."""
    found = cached_file(
        source,
        MANIFEST_NAME,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return Manifest() if found is None else Manifest.load(found.removesuffix(MANIFEST_NAME))


def float_facts(manifest: Manifest, source: str) -> dict[str, FloatFacts]:
    """Return what a manifest says about the float weights that compressed ones were made from, by name.

    Raises:
        ValueError: if it does not describe them as hf_r2 does.
    """
    try:
        return {str(weight["name"]): _facts_of(weight) for weight in manifest.last("quantize").get("weights", [])}
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(_not_ours(source, "its weights", error)) from error


def _facts_of(weight: Mapping[str, Any]) -> FloatFacts:
    # A manifest has None where a ratio is infinite: nothing was lost
    sqnr = {int(bits): inf if value is None else float(value) for bits, value in weight["sqnr"].items()}
    compressed = weight["compressed_sqnr"]
    figures = [float(weight[key]) for key in ("rms", "crest_factor", "kurtosis")]
    if not all(0 <= figure < inf for figure in figures):
        raise ValueError(f"{weight['name']}: rms, crest factor and kurtosis are {figures}")
    return FloatFacts(*figures, sqnr, inf if compressed is None else float(compressed))


def training_curves(manifest: Manifest, source: str) -> dict[str, Curve]:
    """Return the curves of `CURVES` that a manifest's training logged at two steps or more.

    Raises:
        ValueError: if its log is not that of a Trainer.
    """
    curves: dict[str, Curve] = {}
    try:
        for entry in manifest.last("train").get("log_history") or []:
            for name in CURVES.keys() & entry.keys():
                if entry[name] is not None:
                    curves.setdefault(name, []).append((float(entry["step"]), float(entry[name])))
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise ValueError(_not_ours(source, "its training", error)) from error
    return {name: curves[name] for name in CURVES if len(curves.get(name, [])) > 1}


def _not_ours(source: str, what: str, error: Exception) -> str:
    return f"{source}: {MANIFEST_NAME} does not describe {what} as hf_r2 does ({error!r}); restore or delete it"
