"""The pictures of the study: accuracy by bits, recovery by crest factor, accuracy by size."""

from collections.abc import Callable
from statistics import mean, stdev

from evidence import Measured
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from plan import Row

BITS = {2: "uniform, 2 bits", 3: "uniform, 3 bits", 4: "uniform, 4 bits", 8: "uniform, 8 bits"}
RECOVERED = "uniform, 2 bits"
SHOWN = {"none": "0.5", "weight decay": "tab:brown", "prox": "tab:blue", "clip": "tab:orange"}
MARKERS = "os^vDPX*<>ph"
SIZES = (16, 32, 64, 128, 256)


def panels(measured: Measured, draw: Callable[[Axes, Row, dict[str, str]], None]) -> Figure:
    """Make one panel per task and optimizer, in two rows, and draw each row of the tables with a style of its own."""
    columns = (len(measured.pairs) + 1) // 2
    figure = Figure(figsize=(3.6 * columns, 7), layout="constrained")
    axes = list(figure.subplots(2, columns, squeeze=False).flat)
    names = list(measured.study["restrictions"])
    for axis, pair in zip(axes, measured.pairs, strict=False):
        axis.set_title(", ".join(pair), fontsize=10)
        axis.grid(alpha=0.3)
        for row in measured.rows_of(*pair):
            draw(axis, row, {"color": f"C{names.index(row.restriction)}", "label": row.restriction})
    for axis in axes[len(measured.pairs) :]:
        axis.set_axis_off()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def draw_bits(measured: Measured) -> Figure:
    """Draw accuracy by bits of uniform weights with min-max ranges, a line per restriction; bars are deviations."""
    names = list(measured.study["restrictions"])

    def draw(axis: Axes, row: Row, style: dict[str, str]) -> None:
        runs = [measured.figures(row, name) for name in (*BITS.values(), "float")]
        places = [place + 0.03 * (names.index(row.restriction) - len(names) / 2) for place in range(len(runs))]
        axis.errorbar(places, list(map(mean, runs)), list(map(stdev, runs)), marker=".", lw=1, elinewidth=0.7, **style)
        axis.set_xticks(range(len(runs)), [*map(str, BITS), "float"])
        axis.set_xlabel("bits")
        axis.set_ylabel("accuracy, %")

    return panels(measured, draw)


def draw_crest(measured: Measured) -> Figure:
    """Draw recovery of 2-bit weights by the crest factor of the float ones, a dot per model."""

    def draw(axis: Axes, row: Row, style: dict[str, str]) -> None:
        crests = [run["crest_factor"] for run in measured.runs(row, "float")]
        axis.plot(crests, measured.recoveries(row, RECOVERED), ".", **style)
        axis.set_xlabel("crest factor, max|W| / rms(W)")
        axis.set_ylabel("recovery at 2 bits, %")

    return panels(measured, draw)


def draw_size(measured: Measured) -> Figure:
    """Draw accuracy by bytes of the weights of all that is compared; colours are starts, shapes are methods."""
    compared = measured.study["compared"]["tasks"]
    figure = Figure(figsize=(3.9 * len(compared), 4.6), layout="constrained")
    all_axes = figure.subplots(1, len(compared), squeeze=False)[0]
    methods: dict[str, str] = {}
    for axis, (task, optimizer) in zip(all_axes, compared.items(), strict=True):
        for restriction, colour in SHOWN.items():
            row = Row(task, optimizer, restriction)
            for name in measured.compressions(row):
                marker = methods.setdefault(name.partition(",")[0], MARKERS[len(methods)])
                nbytes = measured.runs(row, name)[0]["weight_bytes"]
                accuracy = mean(measured.figures(row, name, best=True))
                axis.plot(nbytes / 1024, accuracy, marker, color=colour, mfc="none", ms=6)
        axis.set_title(f"{task}, {optimizer}", fontsize=10)
        axis.set_xscale("log")
        axis.minorticks_off()
        axis.set_xticks(SIZES, SIZES)
        axis.set_xlabel("weights, KiB")
        axis.grid(alpha=0.3)
    all_axes[0].set_ylabel("accuracy, %")
    handles = [Line2D([], [], ls="", marker="s", color=colour, label=name) for name, colour in SHOWN.items()]
    handles += [Line2D([], [], ls="", marker=each, color="k", mfc="none", label=name) for name, each in methods.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=7, fontsize=8)
    return figure
