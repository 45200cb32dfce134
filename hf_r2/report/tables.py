"""Markdown tables of measured results."""

from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Any

Row = dict[str, Any]
NAMES = ("recipe", "weights", "batch norm")
COLUMNS = {
    "accuracy": ("accuracy", "{:.1%}"),
    "perplexity": ("perplexity", "{:.2f}"),
    "recovery": ("recovery", "{:.1%}"),
    "crest_factor": ("crest factor", "{:.2f}"),
    "bytes": ("file bytes", "{:,.0f}"),
    "ratio": ("ratio", "{:.1f}×"),
}
"""Heading and format of every figure of a result row; perplexity is a language model's."""


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out a Markdown table, padded so that it also reads well in a terminal."""
    widths = [max(len(cell) for cell in column) for column in zip(header, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.ljust(width) if index < 3 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * (width - 1) if index < 3 else "-" * (width - 1) + ":" for index, width in enumerate(widths)]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *map(line, rows)])


def result_table(runs: Sequence[Sequence[Row]]) -> str:
    """Render result rows of one or several runs of the same recipe (seeds) as a table.

    Args:
        runs: rows of each run, the same rows in the same order: `recipe`, `weights`, `batch_norm`, `accuracy`,
            `collapsed`, `recovery`, `crest_factor`, `bytes`, `ratio`, and of language models `perplexity`.

    Returns:
        Markdown; several runs as mean ± standard deviation. A row that collapsed in any run says so.

    Raises:
        ValueError: if the runs do not have the same rows.
    """
    labels = [[(row["recipe"], row["weights"], row["batch_norm"]) for row in rows] for rows in runs]
    if any(names != labels[0] for names in labels):
        raise ValueError("these runs measured different rows; render runs of one recipe together")
    columns = {key: column for key, column in COLUMNS.items() if key in runs[0][0]}
    lines = []
    for same in zip(*runs, strict=True):
        collapsed = sum(row["collapsed"] for row in same)
        note = "" if not collapsed else " (collapsed)" if len(runs) == 1 else f" ({collapsed} of {len(runs)} collapsed)"
        figures = {key: spread(same, key, pattern) for key, (_, pattern) in columns.items()}
        figures["accuracy"] += note
        lines.append([*(same[0][key] for key in ("recipe", "weights", "batch_norm")), *figures.values()])
    return markdown_table((*NAMES, *(heading for heading, _ in columns.values())), lines)


def spread(rows: Sequence[Row], key: str, pattern: str) -> str:
    """Format a value, or the mean ± standard deviation of several that differ; nothing where none was measured."""
    values = [row[key] for row in rows]
    if None in values:
        return ""
    mean = pattern.format(fmean(values))
    return mean if len(set(values)) == 1 else f"{mean} ± {pattern.format(stdev(values))}"
