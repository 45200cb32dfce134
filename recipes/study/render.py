"""Render a study's tables and picture into README.md, from its result files.

python recipes/study/render.py recipes/study/range_restriction.yaml           # write
python recipes/study/render.py recipes/study/range_restriction.yaml --check   # exit 1 if README.md says otherwise
"""

import argparse
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from plan import candidates, chosen, load_result, settings, tests, trials
from tables import publish, spread

COLUMNS = {
    "float": "float",
    "min_max": "2 bits",
    "min_max_bn": "2 bits, BN re-estimated",
    "mse": "2 bits, MSE range",
    "mse_bn": "2 bits, MSE range, BN re-estimated",
}
METRICS = {"digits": "accuracy", "text": "next-byte accuracy"}


def render(study: dict[str, Any]) -> str:
    """Render a table per data set and optimizer, each row with the number of its runs."""
    parts = []
    for data, setting in study["data"].items():
        for optimizer in setting["optimizers"]:
            rows = [row for row in settings(study) if row[:2] == (data, optimizer)]
            parts.append(
                f"**{data}, {optimizer}**: {METRICS[data]} in %, grain {setting['grain']}.{_chance(study, rows)}"
            )
            parts.append(_table(study, rows))
    return "\n\n".join(parts)


def _table(study: dict[str, Any], rows: list[tuple[str, str, str]]) -> str:
    measured = {row[2]: _results(study, row) for row in rows}
    columns = [column for column in COLUMNS if any(column in result for runs in measured.values() for result in runs)]
    lines = [
        "| restriction | chosen | " + " | ".join(COLUMNS[column] for column in columns) + " | crest factor |",
        "|---|---|" + "---|" * (len(columns) + 1),
    ]
    for row in rows:
        runs = measured[row[2]]
        cells = [spread([100 * run[column] for run in runs], 1) for column in columns]
        cells.append(spread([run["crest_factor"] for run in runs], 2))
        lines.append(f"| {row[2]} | {_choice(study, row)} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _results(study: dict[str, Any], row: tuple[str, str, str]) -> list[dict[str, float]]:
    results = [load_result(study, spec) for spec in tests(study, row)]
    if not results or None in results:
        raise SystemExit(f"runs of {row} are missing: python recipes/study/run.py recipes/study/{study['name']}.yaml")
    return results


def _choice(study: dict[str, Any], row: tuple[str, str, str]) -> str:
    if not trials(study, row):
        return ""
    options = candidates(study, *row)
    varied = [key for key in options[0] if len({str(option[key]) for option in options}) > 1]
    picked = options[chosen(study, row)]
    return ", ".join(f"{key.removeprefix('r2_')} {picked[key]:g}" for key in varied)


def _chance(study: dict[str, Any], rows: list[tuple[str, str, str]]) -> str:
    bigram = _results(study, rows[0])[0].get("bigram")
    return f" The most frequent successor of a byte is right in {100 * bigram:.1f} %." if bigram is not None else ""


def draw(study: dict[str, Any], path: Path) -> None:
    """Draw float and 2-bit accuracy of every restriction: one panel per data set and optimizer, a dot per seed."""
    panels = [(data, optimizer) for data, setting in study["data"].items() for optimizer in setting["optimizers"]]
    names = list(study["restrictions"])
    figure = Figure(figsize=(4 * len(panels), 0.36 * len(names) + 1.4), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for axis, panel in zip(axes, panels, strict=True):
        for height, name in enumerate(names):
            runs = _results(study, (*panel, name))
            for column, colour, marker in (
                ("float", "0.6", "|"),
                ("mse", "tab:orange", "x"),
                ("min_max", "tab:blue", "o"),
            ):
                label = COLUMNS[column] if height == 0 else None
                values = [100 * run[column] for run in runs]
                axis.plot(values, [height] * len(runs), marker, color=colour, label=label, alpha=0.8)
        axis.set_title(", ".join(panel))
        axis.set_xlabel(f"{METRICS[panel[0]]}, %")
        axis.grid(axis="x", alpha=0.3)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    publish(options.study, "render.py", render, draw, options.check)


if __name__ == "__main__":
    main()
