"""What the renderers of the studies share: figures, blocks between markers, and pictures that say what they show."""

import argparse
import hashlib
import os
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from matplotlib.figure import Figure
from PIL import Image
from results import Study, load_study, result_files

from hf_r2.files import atomic_write

HERE = Path(__file__).parent
README = HERE / "README.md"


def spread(values: Sequence[float], digits: int = 1) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def insert(text: str, name: str, program: str, rendered: str) -> str:
    """Put what is rendered between the markers of a study."""
    begin, end = f"<!-- {name}: rendered by recipes/study/{program} -->", f"<!-- end of {name} -->"
    head, found, rest = text.partition(begin)
    if not found:
        raise SystemExit(f"no line {begin}")
    return f"{head}{begin}\n\n{rendered}\n\n{end}{rest.partition(end)[2]}"


def publish(
    study: Study,
    program: str,
    blocks: dict[Path, dict[str, str]],
    pictures: dict[str, Callable[[], Figure]],
    check: bool,
) -> None:
    """Write a study's tables and pictures; with `check`, exit with 1 if what is written is not what results say.

    Args:
        study: the study.
        program: file name of the renderer.
        blocks: by document, by the name in its markers, what is rendered.
        pictures: by file name, what draws them.
        check: compare only.
    """
    stale = []
    for document, parts in blocks.items():
        current = rendered = document.read_text(encoding="utf-8")
        for name, block in parts.items():
            rendered = insert(rendered, name, program, block)
        if not check:
            atomic_write(document, rendered)
        elif rendered != current:
            stale.append(str(document))
    source = source_of(study, program)
    for name, draw in pictures.items():
        if not check:
            draw().savefig(HERE / name, dpi=110, metadata={"Source": source})
        elif Image.open(HERE / name).info.get("Source") != source:
            stale.append(name)
    if stale:
        raise SystemExit(f"{', '.join(stale)}: not what the results say. Run python recipes/study/{program}")


def source_of(study: Study, program: str) -> str:
    """Hash what a picture is drawn from: the results, and the programs that draw it."""
    files = [*result_files(study), HERE / program, HERE / "figures.py"]
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()


def run_and_publish(
    doc: str,
    program: str,
    run: Callable[[Study, int], None],
    render: Callable[[Study], str],
    draw: Callable[[Study], Figure] | None = None,
) -> None:
    """Run what a study lacks and publish it, as the command line says."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    study = load_study(options.study)
    if not options.render:
        run(study, options.processes)
    pictures = {f"{study['name']}.png": lambda: draw(study)} if draw else {}
    publish(study, program, {README: {study["name"]: render(study)}}, pictures, options.check)
