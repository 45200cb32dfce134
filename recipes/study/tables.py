"""What the renderers of the studies share."""

import argparse
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from plan import load_study

from hf_r2.files import atomic_write

README = Path(__file__).parent / "README.md"
Study = dict[str, Any]


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def insert(text: str, name: str, program: str, rendered: str) -> str:
    """Put what is rendered between the markers of a study."""
    begin, end = f"<!-- {name}: rendered by recipes/study/{program} -->", f"<!-- end of {name} -->"
    head, _, rest = text.partition(begin)
    return f"{head}{begin}\n\n{rendered}\n\n{end}{rest.partition(end)[2]}"


def publish(
    path: Path, program: str, render: Callable[[Study], str], draw: Callable[[Study, Path], None] | None, check: bool
) -> None:
    """Write a study's tables and picture from its results; with `check`, exit with 1 if README.md says otherwise."""
    study, current = load_study(path), README.read_text(encoding="utf-8")
    rendered = insert(current, study["name"], program, render(study))
    if not check:
        atomic_write(README, rendered)
        if draw is not None:
            draw(study, README.with_name(f"{study['name']}.png"))
    elif rendered != current:
        raise SystemExit(f"README.md differs from the results: python recipes/study/{program} {path}")


def run_and_publish(
    doc: str,
    program: str,
    run: Callable[[Study, int], None],
    render: Callable[[Study], str],
    draw: Callable[[Study, Path], None] | None = None,
) -> None:
    """Run what a study lacks and publish it, as the command line says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    if not options.render:
        run(load_study(options.study), options.processes)
    publish(options.study, program, render, draw, options.check)
