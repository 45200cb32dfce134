"""Render the results table of README.md from the manifests in model_cards/.

python recipes/render_results.py           # write
python recipes/render_results.py --check   # exit 1 if README.md differs from what the manifests say
"""

import sys
from pathlib import Path

from hf_r2.files import atomic_write
from hf_r2.report import Manifest, result_table

ROOT = Path(__file__).resolve().parent.parent
BEGIN, END = "<!-- results: rendered by recipes/render_results.py -->", "<!-- end of results -->"


def render(cards: Path) -> str:
    """Render one table per recipe; the runs of a recipe are the folders below its own."""
    parts = []
    for recipe in sorted(path for path in cards.iterdir() if path.is_dir()):
        runs = [Manifest.load(path.parent).last("evaluate") for path in sorted(recipe.glob("*/manifest.json"))]
        if not runs:
            continue
        seeds = len(runs)
        first = runs[0]
        seconds = [run["seconds"] for run in runs]
        hardware = first["environment"]["hardware"]
        device = hardware["accelerator"] or f"{hardware['cpus']} CPU cores"
        parts.append(
            f"[{first['name']}](model_cards/{recipe.name}) on {first['data']['name']}, {first['data']['split']} split "
            f"({first['rows'][0]['examples']} examples), mean ± standard deviation over {seeds} seeds, "
            f"{min(seconds):.0f}–{max(seconds):.0f} seconds a run on {device}:\n\n"
            + result_table([run["rows"] for run in runs])
        )
    return "\n\n".join(parts)


def insert(text: str, rendered: str) -> str:
    """Put the rendered results between their markers."""
    head, _, rest = text.partition(BEGIN)
    _, _, tail = rest.partition(END)
    return f"{head}{BEGIN}\n\n{rendered}\n\n{END}{tail}"


def main() -> None:
    readme = ROOT / "README.md"
    current = readme.read_text(encoding="utf-8")
    rendered = insert(current, render(ROOT / "model_cards"))
    if "--check" not in sys.argv[1:]:
        atomic_write(readme, rendered)
    elif rendered != current:
        raise SystemExit("README.md differs from the manifests: run python recipes/render_results.py")


if __name__ == "__main__":
    main()
