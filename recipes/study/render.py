"""Render the study's tables, pictures and conclusions, and the headline of the project's README, from its result files.

    python recipes/study/render.py            # write
    python recipes/study/render.py --check    # exit 1 if anything written differs from the results

The words of the conclusions and of the headline are in *.md.jinja; their figures come from the cells that they link to.
"""

import argparse
from pathlib import Path
from statistics import mean

import jinja2
from evidence import Measured
from figures import draw_bits, draw_crest, draw_size
from plan import Row
from results import load_study
from tables import HERE, README, publish, spread

from hf_r2.report.tables import markdown_table

ROOT = HERE.parent.parent
COLUMNS = {
    "uniform, 8 bits": "8 bits",
    "uniform, 4 bits": "4 bits",
    "uniform, 3 bits": "3 bits",
    "uniform, 2 bits": "2 bits",
    "uniform, 2 bits, MSE range": "2 bits, MSE range",
    "palette, 4 bits": "palette, 4 bits",
    "palette, 2 bits": "2 bits",
    "palette, 1 bit": "1 bit",
    "least squares, 2 bits": "least squares, 2 bits",
    "least squares, 1 bit": "1 bit",
}
METRICS = {"digits": "accuracy", "mnist": "accuracy", "text": "next-byte accuracy"}
CORRELATED = ("uniform, 2 bits", "uniform, 2 bits, MSE range", "palette, 2 bits", "least squares, 2 bits")

# Heading, restriction, compression, and whether batch norm is re-estimated. R2 is clipping in every step
HEADLINE = [
    ("float", "none", "float", False),
    ("float, R2", "clip", "float", False),
    ("2 bits", "none", "uniform, 2 bits", False),
    ("2 bits, R2", "clip", "uniform, 2 bits", False),
    ("2 bits, repaired", "weight decay", "uniform, 2 bits, MSE range", True),
    ("2 bits, R2, repaired", "clip", "uniform, 2 bits, MSE range", True),
]


def tables(measured: Measured) -> str:
    """Render a table per task and optimizer, and one more with batch norm re-estimated where there is any."""
    parts = []
    for task, optimizer in measured.pairs:
        rows = measured.rows_of(task, optimizer)
        title = f"{heading(measured, task, optimizer)}, grain {measured.study['tasks'][task]['grain']}"
        parts += [f"{title}.{_bigram(measured, rows[0])}", restriction_table(measured, rows, best=False)]
        if has_batch_norm(measured, rows[0]):
            parts += [f"{title}, batch norm re-estimated.", restriction_table(measured, rows, best=True)]
    return "\n\n".join(parts)


def heading(measured: Measured, task: str, optimizer: str) -> str:
    return f"**{task}, {optimizer}**: {METRICS[measured.study['tasks'][task]['data']]} in %"


def restriction_table(measured: Measured, rows: list[Row], best: bool) -> str:
    header = ("restriction", "chosen", "crest factor", "float", *COLUMNS.values())
    lines = []
    for row in rows:
        crest = spread([run["crest_factor"] for run in measured.runs(row, "float")], 2)
        cells = [spread(measured.figures(row, name, best=best)) for name in COLUMNS]
        lines.append((link(measured, row), measured.choice(row), crest, spread(measured.figures(row, "float")), *cells))
    return markdown_table(header, lines)


def comparison(measured: Measured) -> str:
    """Render what each method makes of the same float models, a table per task."""
    compared = measured.study["compared"]
    parts = []
    for task, optimizer in compared["tasks"].items():
        rows = [Row(task, optimizer, restriction) for restriction in compared["restrictions"]]
        columns = [(row, False) for row in rows]
        if has_batch_norm(measured, rows[0]):
            columns += [(row, True) for row in rows]
        lines = []
        for name in measured.compressions(rows[0]):
            cells = [spread(measured.figures(row, name, best=best)) for row, best in columns]
            lines.append((name, f"{measured.bits_per_weight(rows[0], name):.2f}", *cells))
        header = ("method", "bits per weight", *(f"{row.restriction}{', BN' * best}" for row, best in columns))
        parts += [f"{heading(measured, task, optimizer)}.", markdown_table(header, lines)]
    return "\n\n".join(parts)


def correlations(measured: Measured) -> str:
    """Render how well the crest factor of a float model ranks what is left of its accuracy."""
    repaired = CORRELATED[1]
    header = ("task", "optimizer", *CORRELATED, f"{repaired}, BN")
    lines = []
    for task, optimizer in measured.pairs:
        cells = [f"{measured.crest_correlation(task, optimizer, name):+.2f}" for name in CORRELATED]
        with_norm = has_batch_norm(measured, measured.rows_of(task, optimizer)[0])
        last = f"{measured.crest_correlation(task, optimizer, repaired, best=True):+.2f}" if with_norm else ""
        lines.append((task, optimizer, *cells, last))
    return markdown_table(header, lines)


def has_batch_norm(measured: Measured, row: Row) -> bool:
    return "accuracy_bn" in measured.runs(row, "uniform, 2 bits")[0]


def headline(measured: Measured, prefix: str) -> str:
    """Render what R2 does for 2-bit weights, a row per task with one optimizer; figures link to cells."""
    lines = []
    for task, setting in measured.study["tasks"].items():
        optimizer = measured.study["compared"]["tasks"].get(task, next(iter(setting["optimizers"])))
        cells = []
        for _, restriction, compression, best in HEADLINE:
            row = Row(task, optimizer, restriction)
            cells.append(link(measured, row, spread(measured.figures(row, compression, best=best)), prefix))
        lines.append((task, optimizer, *cells))
    return markdown_table(("task", "optimizer", *(heading for heading, *_ in HEADLINE)), lines)


def link(measured: Measured, row: Row, text: str | None = None, prefix: str = "") -> str:
    """Link to the cells of a row, from a document that this folder is found from by a prefix."""
    return f"[{text or row.restriction}]({prefix}results/{measured.folder(row)})"


def words(measured: Measured, template: str, prefix: str = "") -> str:
    """Render a text; its figures are means over seeds and link to their cells."""

    def figure(task: str, optimizer: str, restriction: str, compression: str, best: bool = False) -> str:
        row = Row(task, optimizer, restriction)
        return link(measured, row, f"{mean(measured.figures(row, compression, best=best)):.1f} %", prefix)

    def crest(task: str, optimizer: str, restriction: str) -> str:
        row = Row(task, optimizer, restriction)
        return link(measured, row, f"{mean(run['crest_factor'] for run in measured.runs(row, 'float')):.2f}", prefix)

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HERE), undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )

    def correlation(task: str, optimizer: str, compression: str) -> str:
        return f"{measured.crest_correlation(task, optimizer, compression):+.2f}"

    def choice(task: str, optimizer: str, restriction: str) -> str:
        return measured.choice(Row(task, optimizer, restriction))

    names = {"figure": figure, "crest": crest, "correlation": correlation, "choice": choice}
    names |= {"headline": headline(measured, prefix)}
    return environment.get_template(template).render(**names).strip()


def _bigram(measured: Measured, row: Row) -> str:
    found = measured.runs(row, "float")[0].get("bigram")
    return f" The most frequent successor of a byte is right in {100 * found:.1f} %." if found is not None else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path, nargs="?", default=HERE / "study.yaml")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    measured = Measured(load_study(options.study))
    blocks = {
        README: {
            "conclusions": words(measured, "conclusions.md.jinja"),
            "evidence": tables(measured),
            "comparison": comparison(measured),
            "crest factors": correlations(measured),
        },
        ROOT / "README.md": {"headline": words(measured, "headline.md.jinja", "recipes/study/")},
    }
    pictures = {
        "bits.png": lambda: draw_bits(measured),
        "crest_factors.png": lambda: draw_crest(measured),
        "sizes.png": lambda: draw_size(measured),
    }
    publish(measured.study, "render.py", blocks, pictures, options.check)


if __name__ == "__main__":
    main()
