"""Render the results tables of README.md and recipes/README.md from the manifests in model_cards/.

python recipes/render_results.py           # write
python recipes/render_results.py --check   # exit 1 if a README differs from what the manifests say
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_r2.files import atomic_write
from hf_r2.report import Manifest, result_table
from hf_r2.report.tables import markdown_table, spread

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: rendered by recipes/render_results.py -->", "<!-- end of results -->"


HEADER = (
    "recipe", "data", "hardware", "seconds", "float", "PTQ", "R2 + PTQ", "aware", "R2 + aware", "bytes", "ratio",
    "recovery",
)  # fmt: skip


def recipes(cards: Path) -> list[tuple[Path, list[Manifest]]]:
    """List the published recipes, each with the manifests of its runs (seeds)."""
    folders = [(path, sorted(path.glob("*/manifest.json"))) for path in sorted(cards.iterdir())]
    return [(folder, [Manifest.load(path.parent) for path in paths]) for folder, paths in folders if paths]


def render(cards: Path) -> str:
    """Render the overview, and one table per recipe with every row that its runs measured."""
    parts = [overview(cards)]
    for folder, manifests in recipes(cards):
        runs = [manifest.last("evaluate") for manifest in manifests]
        first, data = runs[0], runs[0]["data"]
        parts.append(
            f"[{first['name']}](../model_cards/{folder.name}) on {data['name']}, {data['split']} split "
            f"({first['rows'][0]['examples']} {unit(first)}), mean ± standard deviation over {len(runs)} seeds, "
            f"{seconds(runs)} seconds a run on {hardware(first)}:\n\n" + result_table([run["rows"] for run in runs])
        )
    return "\n\n".join(parts)


def overview(cards: Path, links: str = "../model_cards") -> str:
    """Render one line per recipe: what compression costs after training and in training, with R2 and without."""
    lines = [overview_line(f"{links}/{folder.name}", manifests) for folder, manifests in recipes(cards)]
    return markdown_table(HEADER, lines)


def overview_line(link: str, manifests: Sequence[Manifest]) -> list[str]:
    runs = [manifest.last("evaluate") for manifest in manifests]
    r2, first = manifests[0].last("train")["r2"], runs[0]
    aware = manifests[0].last("quantize")["quantization_config"].get("aware")
    published = [next(row for row in run["rows"] if row.get("published")) for run in runs]
    cells = dict.fromkeys(("float", "PTQ", "R2 + PTQ", "aware", "R2 + aware"), "")
    baseline = [[row for row in run["rows"] if row["recipe"] == "baseline"] for run in runs]
    if all(baseline):
        cells["float"] = metric([rows[0] for rows in baseline])
        cells["PTQ"] = metric([rows[-1] for rows in baseline])
    cells[("R2 + " if r2 else "") + ("aware" if aware else "PTQ")] = metric(published)
    return [
        f"[{first['name']}]({link})",
        first["data"]["name"],
        hardware(first),
        seconds(runs),
        *cells.values(),
        spread(published, "bytes", "{:,.0f}"),
        spread(published, "ratio", "{:.1f}×"),
        spread(published, "recovery", "{:.1%}"),
    ]


def metric(rows: Sequence[dict[str, Any]]) -> str:
    """Format the perplexity of language models, and the accuracy of classifiers."""
    if "perplexity" in rows[0]:
        return f"{spread(rows, 'perplexity', '{:.2f}')} ppl"
    return spread(rows, "accuracy", "{:.1%}")


def unit(run: dict[str, Any]) -> str:
    return "tokens" if "perplexity" in run["rows"][0] else "examples"


def seconds(runs: Sequence[dict[str, Any]]) -> str:
    taken = [run["seconds"] for run in runs]
    return f"{min(taken):.0f}–{max(taken):.0f}"


def hardware(run: dict[str, Any]) -> str:
    facts = run["environment"]["hardware"]
    return facts["accelerator"] or f"{facts['cpus']} CPU cores"


def contents() -> dict[Path, str]:
    """Return what stands between the markers of each README."""
    cards = ROOT / "model_cards"
    return {ROOT / "README.md": overview(cards, "model_cards"), ROOT / "recipes" / "README.md": render(cards)}


def insert(text: str, rendered: str) -> str:
    """Put the rendered results between their markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{rendered}\n\n{END}{tail}"


def main() -> None:
    for readme, content in contents().items():
        current = readme.read_text(encoding="utf-8")
        rendered = insert(current, content)
        if "--check" not in sys.argv[1:]:
            atomic_write(readme, rendered)
        elif rendered != current:
            raise SystemExit(f"{readme} differs from the manifests: run python recipes/render_results.py")


if __name__ == "__main__":
    main()
