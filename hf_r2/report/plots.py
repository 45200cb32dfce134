"""Pictures of weights."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib.figure
import numpy as np
import torch
from torch import Tensor

from hf_r2.report.statistics import WeightStatistics

BINS = 121
_FLOAT_COLOR, _COMPRESSED_COLOR = "#8da0cb", "#d1495b"


def weight_histograms(
    panels: Mapping[str, tuple[Sequence[Tensor], Sequence[Tensor]]], path: str | os.PathLike[str], label: str
) -> Path:
    """Draw float and compressed weights as histograms, one panel a model, on shared axes.

    Every weight is divided by the rms of its float values, so that all of them share one axis; a weight without
    outliers is narrow there.

    Args:
        panels: title of a panel to its float weights and the same weights compressed.
        path: PNG file to write.
        label: what the compressed weights are called in the legend, such as `"2-bit"`.

    Returns:
        The path.
    """
    scaled = {title: [_in_rms(*pair) for pair in zip(*weights, strict=True)] for title, weights in panels.items()}
    reach = max(float(values.abs().max()) for pairs in scaled.values() for pair in pairs for values in pair) * 1.02
    edges = np.linspace(-reach, reach, BINS + 1)
    figure = matplotlib.figure.Figure(figsize=(8, 2.6 * len(panels)), dpi=130, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for axis, (title, pairs) in zip(axes, scaled.items(), strict=True):
        floats, compressed = (torch.cat(values).numpy() for values in zip(*pairs, strict=True))
        crest = np.mean([float(values.abs().max()) for values, _ in pairs])
        axis.hist(floats, edges, weights=_shares(floats), color=_FLOAT_COLOR, label="float")
        axis.hist(compressed, edges, weights=_shares(compressed), histtype="step", color=_COMPRESSED_COLOR, label=label)
        axis.set_yscale("log")
        axis.set_title(f"{title}: mean crest factor {crest:.2f}", loc="left", fontsize=10)
        axis.set_ylabel("share of weights")
        axis.legend(loc="upper right", frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel("weight / rms of its tensor")
    figure.savefig(path)
    return Path(path)


def weight_profile(statistics: Sequence[WeightStatistics], path: str | os.PathLike[str]) -> Path:
    """Draw the crest factor and the SQNR of every weight, in the order of the model.

    Args:
        statistics: of at least one weight.
        path: PNG file to write.

    Returns:
        The path.
    """
    figure = matplotlib.figure.Figure(figsize=(8, 5), dpi=130, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    upper.plot([weight.crest_factor for weight in statistics], ".-", color=_FLOAT_COLOR)
    upper.set_yscale("log")
    upper.set_ylabel("crest factor")
    for bits, color in ((2, _COMPRESSED_COLOR), (4, _FLOAT_COLOR)):
        lower.plot([weight.sqnr[bits] for weight in statistics], ".-", color=color, label=f"{bits}-bit")
    lower.set_ylabel("SQNR (dB)")
    lower.set_xlabel("weight, in the order of the model")
    lower.legend(frameon=False, fontsize=9)
    for axis in (upper, lower):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)
    return Path(path)


class SizedLoss(NamedTuple):
    """A way to compress a model.

    Args:
        nbytes: bytes of its files.
        predicted: loss that was predicted.
        measured: KL divergence in nats that was measured; None if it was not.
    """

    nbytes: int
    predicted: float
    measured: float | None


def size_against_loss(
    front: Sequence[SizedLoss],
    uniform: Mapping[str, SizedLoss],
    chosen: SizedLoss,
    path: str | os.PathLike[str],
    unit: str,
) -> Path:
    """Draw size against predicted loss, and below it against measured loss where there is any.

    Args:
        front: points of the Pareto front, from the smallest on.
        uniform: points of the same settings for all weights, by name.
        chosen: the point that was chosen.
        path: PNG file to write.
        unit: what the predicted loss is.

    Returns:
        The path.
    """
    panels = [("predicted", f"predicted: {unit}")]
    if chosen.measured is not None:
        panels.append(("measured", "measured: KL divergence (nats)"))
    figure = matplotlib.figure.Figure(figsize=(8, 3.4 * len(panels)), dpi=130, layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    scale, size_unit = (1e6, "MB") if chosen.nbytes >= 1e6 else (1e3, "kB")
    for axis, (which, title) in zip(axes, panels, strict=True):

        def curve(points: Sequence[SizedLoss], which: str = which) -> tuple[list[float], list[float]]:
            """Sizes and losses above zero: a logarithmic axis has no place for the others."""
            found = [(point.nbytes / scale, getattr(point, which)) for point in points]
            kept = [(size, loss) for size, loss in found if loss is not None and loss > 0]
            return [size for size, _ in kept], [loss for _, loss in kept]

        axis.plot(*curve(front), ".-", color=_FLOAT_COLOR, label="Pareto front of the predicted loss")
        axis.plot(*curve(list(uniform.values())), "s", color="#555555", markersize=5, label="uniform settings")
        for name, point in uniform.items():
            if (getattr(point, which) or 0) > 0:
                at = (point.nbytes / scale, getattr(point, which))
                axis.annotate(name, at, (5, 4), textcoords="offset points", fontsize=7, color="#555555")
        axis.plot(*curve([chosen]), "*", color=_COMPRESSED_COLOR, markersize=15, label="plan")
        axis.set_yscale("log")
        axis.set_title(title, loc="left", fontsize=10)
        axis.legend(loc="upper right", frameon=False, fontsize=9)
        axis.spines[["top", "right"]].set_visible(False)
    axes[-1].set_xlabel(f"weight files ({size_unit})")
    figure.savefig(path)
    return Path(path)


def _in_rms(weight: Tensor, compressed: Tensor) -> tuple[Tensor, Tensor]:
    """Flatten a float weight and its compressed copy, both in units of the float weight's rms."""
    weight, compressed = weight.detach().float().cpu().flatten(), compressed.detach().float().cpu().flatten()
    rms = weight.square().mean().sqrt().clamp_min(torch.finfo(torch.float32).tiny)
    return weight / rms, compressed / rms


def _shares(values: np.ndarray) -> np.ndarray:
    return np.full(values.size, 1 / values.size)
