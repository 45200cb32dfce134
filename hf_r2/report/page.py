"""The range report: one HTML page, which needs nothing but itself, about the weights of up to three checkpoints."""

import base64
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from itertools import takewhile
from pathlib import Path, PurePath
from statistics import fmean

import jinja2
from matplotlib.figure import Figure
from tqdm import tqdm

from hf_r2.files import atomic_write
from hf_r2.report import range_plots
from hf_r2.report.inspection import stored_weights
from hf_r2.report.ranges import CheckpointRanges, measure_ranges

TEMPLATE = Path(__file__).with_name("report.html.jinja")
MOST_CHECKPOINTS = len(range_plots.COLORS)


@dataclass(frozen=True)
class Picture:
    """A picture of a report.

    Args:
        name: of its PNG file, without suffix.
        figure: draws it.
        alt: says what it shows.
    """

    name: str
    figure: Callable[[], Figure]
    alt: str


@dataclass(frozen=True)
class Report:
    """What a page shows.

    Args:
        checkpoints: in the order of the command.
        names: of all weights: the first checkpoint's, then those that only later ones have.
        pictures: of all weights, by section: `distributions`, `profiles`, `sqnr` and `training`; a section about which
            no checkpoint says anything has none.
        weight_pictures: of each weight, by name.
    """

    checkpoints: list[CheckpointRanges]
    names: list[str]
    pictures: dict[str, Picture]
    weight_pictures: dict[str, Picture]


def write_report(
    sources: Sequence[str], output: str | os.PathLike[str], png: str | os.PathLike[str] | None = None
) -> None:
    """Write the range report of one to three checkpoints: histograms, crest factors, kurtosis, SQNR, training curves.

    Weights are read one after another, so memory follows the largest. Weights of several checkpoints are matched by
    parameter name.

    Args:
        sources: directories or Hub names of float or compressed checkpoints in safetensors.
        output: HTML file to write.
        png: folder for the page's pictures as PNG; what else it holds stays.

    Raises:
        ValueError: for too many or the same checkpoints, a path that cannot be written to, checkpoints that cannot be
            read (see [`stored_weights`]) and weights with NaN or infinite values.
    """
    output, folder = Path(output), None if png is None else Path(png)
    if output.is_dir() or (folder is not None and folder.exists() and not folder.is_dir()):
        raise ValueError(f"the page is a file and the pictures go to a folder: {output} or {folder} is not")
    report = make_report(measure(sources))
    pictures = [*report.pictures.values(), *report.weight_pictures.values()]
    drawn, pngs = {}, {}
    for picture in tqdm(pictures, desc="Drawing", unit="picture"):
        figure = picture.figure()
        drawn[picture.name] = range_plots.as_svg(figure)
        if folder is not None:
            pngs[folder / f"{picture.name}.png"] = range_plots.as_png(figure)
    page = render_page(report, drawn)
    for path, content in {output: page, **pngs}.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)


def measure(sources: Sequence[str]) -> list[CheckpointRanges]:
    """Measure the weights of one to three checkpoints.

    Raises:
        ValueError: see [`write_report`].
    """
    if not 1 <= len(sources) <= MOST_CHECKPOINTS or len(set(sources)) < len(sources):
        raise ValueError(f"name one to {MOST_CHECKPOINTS} different checkpoints, not {list(sources)}")
    listed = [list(stored_weights(source)) for source in sources]
    with tqdm(total=sum(map(len, listed)), desc="Measuring", unit="weight") as bar:
        return [
            measure_ranges(source, label, weights, bar.update)
            for source, label, weights in zip(sources, short_labels(sources), listed, strict=True)
        ]


def short_labels(sources: Sequence[str]) -> list[str]:
    """Name checkpoints without a path of this machine: by what their paths do not share, in printable characters."""
    if len(sources) == 1:
        labels = [Path(source).absolute().name if os.path.exists(source) else source for source in sources]
    else:
        parts = [PurePath(source).parts for source in sources]
        shared = sum(
            1 for _ in takewhile(lambda same: len(set(same)) == 1, zip(*(part[:-1] for part in parts), strict=False))
        )
        labels = ["/".join(part[shared:]) for part in parts]
    return ["".join(c if c.isprintable() else "\ufffd" for c in label) for label in labels]


def make_report(checkpoints: list[CheckpointRanges]) -> Report:
    """Arrange what a page shows of measured checkpoints."""
    names = list(dict.fromkeys(name for checkpoint in checkpoints for name in checkpoint.weights))
    labels = [checkpoint.label for checkpoint in checkpoints]
    of_all = f"of all weights of {', '.join(labels)}"
    pictures = {
        "distributions": Picture(
            "distributions", lambda: range_plots.distributions(checkpoints), f"Histograms {of_all}, in units of rms"
        ),
        "profiles": Picture(
            "profiles",
            lambda: range_plots.weight_profiles(checkpoints, names),
            f"Crest factor and kurtosis {of_all}; the table below has the figures",
        ),
    }
    if any(map(range_plots.sqnr_table, checkpoints)):
        pictures["sqnr"] = Picture(
            "sqnr",
            lambda: range_plots.sqnr_by_bits(checkpoints),
            f"SQNR by bits {of_all}; the table below has the figures",
        )
    if any(checkpoint.curves for checkpoint in checkpoints):
        pictures["training"] = Picture(
            "training", lambda: range_plots.training_curves(checkpoints), f"Training curves of {', '.join(labels)}"
        )
    return Report(
        checkpoints,
        names,
        pictures,
        {name: _weight_picture(index, name, checkpoints) for index, name in enumerate(names, 1)},
    )


def _weight_picture(index: int, name: str, checkpoints: Sequence[CheckpointRanges]) -> Picture:
    weights = [checkpoint.weights.get(name) for checkpoint in checkpoints]
    labels = [checkpoint.label for checkpoint in checkpoints]
    crests = [
        f"{label}: crest factor {weight.statistics.crest_factor:.2f}"
        for label, weight in zip(labels, weights, strict=True)
        if weight is not None
    ]
    return Picture(
        f"weight-{index:03}-{re.sub('[^A-Za-z0-9._-]', '_', name)[:100]}",
        lambda: range_plots.weight_distribution(weights, labels),
        f"Histogram of {name} ({'; '.join(crests)})",
    )


def render_page(report: Report, drawn: dict[str, bytes]) -> str:
    """Render a report with its pictures, SVG by name, as HTML; all text of files is escaped."""
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"figure": _figure, "shape": lambda shape: "×".join(map(str, shape))}
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    weights = [list(checkpoint.weights.values()) for checkpoint in report.checkpoints]
    before = [any(weight.before for weight in found) for found in weights]
    return template.render(
        report=report,
        shapes={weight.statistics.name: weight.statistics.shape for found in reversed(weights) for weight in found},
        compressed=any(weight.compressed for found in weights for weight in found),
        before=before,
        sqnr_bits=[list(range_plots.new_sqnr_table(report.checkpoints, index)) for index in range(len(weights))],
        colors=range_plots.COLORS,
        summaries=[summary(checkpoint) for checkpoint in report.checkpoints],
        drawn={name: base64.b64encode(svg).decode() for name, svg in drawn.items()},
        version=version("hf_r2"),
    )


def summary(checkpoint: CheckpointRanges) -> dict[str, str | int | float]:
    """Sum up a checkpoint: how its weights are stored, their number and elements, and means over them."""
    weights = list(checkpoint.weights.values())
    elements = [math.prod(weight.statistics.shape) for weight in weights]
    storages: dict[str, int] = {}
    for weight, count in zip(weights, elements, strict=True):
        storages[weight.storage] = storages.get(weight.storage, 0) + count
    crests = [weight.statistics.crest_factor for weight in weights]
    bits = sum(weight.bits_per_weight * count for weight, count in zip(weights, elements, strict=True))
    return {
        "storage": ", ".join(sorted(storages, key=lambda storage: -storages[storage])),
        "weights": len(weights),
        "elements": sum(elements),
        "bits": bits / sum(elements),
        "crest": fmean(crests),
        "highest_crest": max(crests),
        "kurtosis": fmean(weight.statistics.kurtosis for weight in weights),
    }


def _figure(value: float, digits: int = 2) -> str:
    """Format a figure; an infinite SQNR is that of an exact copy."""
    return "exact" if value == math.inf else f"{value:.{digits}f}"
