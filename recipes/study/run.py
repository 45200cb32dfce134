"""Run the cells of the study that have no result yet, on all cores: one process of one thread each.

    python recipes/study/run.py recipes/study/study.yaml [--tasks digits-resnet] [--processes 8]
    python recipes/study/run.py recipes/study/study.yaml --again recipes/study/results/evidence/…/….json

Interrupt it at any time: finished cells stay, and the next start goes on. Float models are kept in outputs/study, so
that other libraries may be installed elsewhere. `render.py` draws up the tables.
"""

import argparse
import json
import logging
import multiprocessing
import os
import sys
from collections import Counter
from collections.abc import Iterable
from multiprocessing.pool import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from peers import PEERS, is_installed
from plan import Row, is_compared, rows, tests, trials
from results import Cell, Study, digest, load_result, load_study, save_result, start_of
from tqdm import tqdm


def run_start(job: tuple[Study, list[Cell]]) -> int:
    """Run the cells that share a float model, and save each result as soon as it is there."""
    import torch
    from cell import run_cell
    from datasets.utils.logging import disable_progress_bar
    from transformers.utils.logging import set_verbosity_error

    torch.set_num_threads(1)
    set_verbosity_error()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    study, cells = job
    for spec in cells:
        save_result(study, spec, run_cell(spec))
    return len(cells)


def run_missing(study: Study, cells: Iterable[Cell], pool: Pool, title: str) -> None:
    jobs: dict[str, list[Cell]] = {}
    for spec in cells:
        if is_installed(spec["compression"].get("peer")) and load_result(study, spec) is None:
            jobs.setdefault(digest(start_of(spec)), []).append(spec)
    with tqdm(desc=title, total=sum(map(len, jobs.values())), unit="cell") as bar:
        for count in pool.imap_unordered(run_start, [(study, job) for job in jobs.values()]):
            bar.update(count)


def run(study: Study, wanted: list[Row], processes: int) -> None:
    os.environ["TQDM_DISABLE"] = "1"  # of the workers: each cell has bars of its own
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        run_missing(study, [spec for row in wanted for spec in trials(study, row)], pool, "Choosing strengths")
        cells = [spec for row in wanted for spec in tests(study, row)]
        run_missing(study, [spec for spec in cells if not is_compared(spec)], pool, "Compressing")
        run_missing(study, cells, pool, "Comparing")
    absent = Counter(spec["compression"]["peer"] for spec in cells if not load_result(study, spec))
    for peer, count in sorted(absent.items()):
        print(f"{count} cells need {peer}: pip install -e '.[{PEERS[peer].extra}]'")


def run_again(files: list[Path]) -> None:
    """Run finished cells again, and exit with 1 if a figure differs."""
    from cell import run_cell

    different = 0
    for file in files:
        finished = json.loads(file.read_text(encoding="utf-8"))
        found = run_cell(finished["cell"])
        for key, before in finished["result"].items():
            if key != "seconds":
                print(f"{file.name}  {key}: {before} before, {found[key]} now")
                different += found[key] != before
    if different:
        raise SystemExit(
            f"{different} figures differ. Other machines and versions of torch round otherwise: see README.md"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--tasks", nargs="+", help="only these")
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--again", nargs="+", type=Path, metavar="FILE", help="results whose cells are run again")
    options = parser.parse_args()
    study = load_study(options.study)
    if options.again:
        return run_again(options.again)
    unknown = set(options.tasks or ()) - study["tasks"].keys()
    if unknown:
        parser.error(f"no task {', '.join(sorted(unknown))}: the study has {', '.join(study['tasks'])}")
    run(study, [row for row in rows(study) if row.task in (options.tasks or study["tasks"])], options.processes)


if __name__ == "__main__":
    main()
