"""Pictures of a range report: figures that become SVG for its page and PNG for cards."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

from hf_r2.report.histogram import coarsened, reach
from hf_r2.report.ranges import CURVES, CheckpointRanges, WeightRange

COLORS = ("#7086c4", "#d1495b", "#2a9d8f")
"""Of the first, second and third checkpoint; they stand out from black and from white."""

_LINES, _MARKERS = ("-", "--", ":"), ("o", "s", "^")
_MOST_BINS, _MOST_BINS_OF_ALL = 97, 193
# The color of text and axes; in SVG it gives way to a color that follows the reader's light or dark scheme
_INK = "#222222"
_SCHEMES = "<style>svg{color:#222}@media(prefers-color-scheme:dark){svg{color:#ddd}}</style>"
_STYLE = {
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _INK),
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": _INK,
    "grid.alpha": 0.12,
    "font.size": 9,
    "legend.frameon": False,
    "svg.fonttype": "none",
}


def as_svg(figure: Figure) -> bytes:
    """Save a figure as SVG that is drawn on whatever is behind it, with text that remains text."""
    file = io.BytesIO()
    with _style():
        figure.savefig(
            file, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
        )
    _, opening, content = file.getvalue().decode().partition("<svg")
    return f"{opening}{content}".replace("<defs>", f"{_SCHEMES}<defs>", 1).replace(_INK, "currentColor").encode()


def as_png(figure: Figure) -> bytes:
    """Save a figure as PNG on white, 1040 pixels wide."""
    file = io.BytesIO()
    with _style():
        figure.savefig(file, format="png", dpi=130)
    return file.getvalue()


def distributions(checkpoints: Sequence[CheckpointRanges]) -> Figure:
    """Draw the elements of all weights of each checkpoint as a histogram, one panel a checkpoint, on shared axes."""
    totals = [np.sum([weight.counts for weight in checkpoint.weights.values()], 0) for checkpoint in checkpoints]
    with _style():
        figure = Figure(figsize=(8, 0.6 + 1.6 * len(checkpoints)), layout="constrained")
        axes = figure.subplots(len(checkpoints), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        for index, (axis, checkpoint) in enumerate(zip(axes, checkpoints, strict=True)):
            _draw_histograms(axis, {index: totals[index]}, max(map(reach, totals)), _MOST_BINS_OF_ALL)
            axis.set_title("-").set(text=checkpoint.label, parse_math=False)
            axis.set_ylabel("share of weights")
        axes[0].set_ylim(bottom=min(map(_one_element, totals)) / 2)
        axes[-1].set_xlabel("weight / rms of its tensor")
    return figure


def weight_distribution(weights: Sequence[WeightRange | None], labels: Sequence[str]) -> Figure:
    """Draw the histograms of one weight in every checkpoint over each other.

    Args:
        weights: the weight in each checkpoint, None where it has none; at least one has.
        labels: what the checkpoints are called.
    """
    counts = {index: weight.counts for index, weight in enumerate(weights) if weight is not None}
    with _style():
        # Margins found by a layout engine would take most of the time, once for every weight
        figure = Figure(figsize=(8, 2.1))
        axis = figure.add_axes((0.09, 0.21, 0.9, 0.66))
        _draw_histograms(axis, counts, max(map(reach, counts.values())), _MOST_BINS)
        axis.set(xlabel="weight / rms", ylabel="share of weights")
        axis.set_ylim(bottom=min(map(_one_element, counts.values())) / 2)
        _add_legend(figure, axis.patches, [labels[index] for index in counts], "upper right")
    return figure


def weight_profiles(checkpoints: Sequence[CheckpointRanges], names: Sequence[str]) -> Figure:
    """Draw the crest factor and the kurtosis of every weight.

    Args:
        checkpoints: of the report.
        names: of all weights, in their order.
    """
    with _style():
        figure = Figure(figsize=(8, 4), layout="constrained")
        upper, lower = figure.subplots(2, 1, sharex=True)
        for axis, statistic, heading in ((upper, "crest_factor", "crest factor"), (lower, "kurtosis", "kurtosis")):
            for index, checkpoint in enumerate(checkpoints):
                found = [checkpoint.weights.get(name) for name in names]
                # Weights of equal values have a kurtosis of 0, which has no place on a logarithmic axis
                values = [
                    np.nan if weight is None else getattr(weight.statistics, statistic) or np.nan for weight in found
                ]
                axis.plot(range(1, len(names) + 1), values, markersize=3.5, **_line(index))
            axis.set_ylabel(heading)
            _logarithmic(axis)
        lower.set_xlabel("weight, in the order of the model")
        lower.xaxis.set_major_locator(MaxNLocator(integer=True))
        _add_legend(figure, upper.lines, [checkpoint.label for checkpoint in checkpoints])
    return figure


def sqnr_by_bits(checkpoints: Sequence[CheckpointRanges]) -> Figure:
    """Draw the SQNR of uniform quantization by bits: mean and extremes over the weights of each checkpoint.

    Crosses are weights as they were compressed, at the bits that they take with their codebooks.
    """
    with _style():
        figure = Figure(figsize=(8, 3), layout="constrained")
        axis = figure.subplots()
        handles = {}
        for index, checkpoint in enumerate(checkpoints):
            if places := [
                (weight.bits_per_weight, weight.before.compressed_sqnr)
                for weight in checkpoint.weights.values()
                if weight.before is not None
            ]:
                handles[index] = axis.scatter(*zip(*places, strict=True), s=24, marker="x", color=COLORS[index])
            if table := new_sqnr_table(checkpoints, index):
                columns = [[value for value in values if np.isfinite(value)] or [np.nan] for values in table.values()]
                lowest, mean, highest = ([over(values) for values in columns] for over in (min, np.mean, max))
                (handles[index],) = axis.plot(list(table), mean, markersize=4, **_line(index))
                axis.fill_between(list(table), lowest, highest, color=COLORS[index], alpha=0.15, linewidth=0)
        axis.set(xlabel="bits of a weight", ylabel="SQNR (dB)")
        _add_legend(figure, list(handles.values()), [checkpoints[index].label for index in handles])
    return figure


def new_sqnr_table(checkpoints: Sequence[CheckpointRanges], index: int) -> dict[int, list[float]]:
    """Return the [`sqnr_table`] of a checkpoint; empty if an earlier one, which it was made from, has the same."""
    table = sqnr_table(checkpoints[index])
    return {} if any(sqnr_table(earlier) == table for earlier in checkpoints[:index]) else table


def sqnr_table(checkpoint: CheckpointRanges) -> dict[int, list[float]]:
    """Gather the SQNR of a checkpoint's weights by bits, of those where it is known."""
    known = [weight.sqnr for weight in checkpoint.weights.values()]
    bits = sorted({bits for sqnr in known for bits in sqnr})
    return {width: [sqnr[width] for sqnr in known if width in sqnr] for width in bits}


def training_curves(checkpoints: Sequence[CheckpointRanges]) -> Figure:
    """Draw every curve that the training of at least one checkpoint logged, one panel each.

    Checkpoints of one training, such as a float one and what it was compressed to, are drawn once.
    """
    trained = {
        index: checkpoint
        for index, checkpoint in enumerate(checkpoints)
        if checkpoint.curves and all(earlier.curves != checkpoint.curves for earlier in checkpoints[:index])
    }
    names = [name for name in CURVES if any(name in checkpoint.curves for checkpoint in checkpoints)]
    rows = (len(names) + 1) // 2
    with _style():
        figure = Figure(figsize=(8, 0.2 + 1.7 * rows), layout="constrained")
        axes = figure.subplots(rows, 2, squeeze=False).flatten()
        for axis, name in zip(axes, names, strict=False):
            for index, checkpoint in trained.items():
                steps, values = zip(*checkpoint.curves.get(name, [(np.nan, np.nan)]), strict=True)
                axis.plot(steps, values, color=COLORS[index], linestyle=_LINES[index])
            axis.set_title(CURVES[name])
            axis.set_xlabel("step")
            if name.endswith("loss") and min(line.get_ydata().min() for line in axis.lines) > 0:
                _logarithmic(axis)
        for axis in axes[len(names) :]:
            axis.remove()
        _add_legend(figure, axes[0].lines, [checkpoint.label for checkpoint in trained.values()])
    return figure


@contextmanager
def _style() -> Iterator[None]:
    # Ticks are made when they are drawn, so saving needs the style as well
    with matplotlib.rc_context(_STYLE):
        yield


def _line(index: int) -> dict[str, str]:
    return {"color": COLORS[index], "linestyle": _LINES[index], "marker": _MARKERS[index]}


def _draw_histograms(axis: Axes, counts: Mapping[int, np.ndarray], within: int, most: int) -> None:
    """Draw histograms by the index of their checkpoint: the first one filled, the others as lines."""
    floor = min(map(_one_element, counts.values())) / 2
    for index, elements in counts.items():
        merged, edges = coarsened(elements, within, most)
        shares = np.maximum(merged / elements.sum(), floor)
        filled = index == min(counts)
        color = (
            {"color": COLORS[index], "alpha": 0.6}
            if filled
            else {"edgecolor": COLORS[index], "linestyle": _LINES[index]}
        )
        axis.stairs(shares, edges, baseline=floor, fill=filled, **color)
    axis.set_yscale("log")
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter("{x:g}")


def _one_element(counts: np.ndarray) -> float:
    return 1 / counts.sum()


def _logarithmic(axis: Axes) -> None:
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    decades = np.log10(high / low)
    steps = (1, 1.5, 2, 3, 5, 7) if decades < 1 else (1, 2, 5) if decades < 2 else (1,)
    axis.yaxis.set_major_locator(LogLocator(subs=steps))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_locator(NullLocator())


def _add_legend(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], place: str = "outside upper right"
) -> None:
    """Name what was drawn; labels are shown as they are, without markup."""
    legend = figure.legend(handles, ["-"] * len(labels), ncols=len(labels), loc=place, fontsize=9)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set(text=label, parse_math=False)
