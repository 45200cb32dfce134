"""Run the cells of a study that have no result yet, on all cores: one process of one thread each.

    python recipes/study/run.py recipes/study/range_restriction.yaml [--processes 8]

Interrupt it at any time: finished cells stay, and the next start goes on. `render.py` draws up the tables.
"""

import argparse
import multiprocessing
import os
import sys
from multiprocessing.pool import Pool
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from plan import load_result, load_study, save_result, settings, tests, trials
from tqdm import tqdm


def work(spec: dict) -> tuple[dict, dict]:
    import torch
    from cell import run_cell
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    return spec, run_cell(spec)


def run_missing(study: dict, cells: list[dict], pool: Pool, title: str) -> None:
    missing = [spec for spec in cells if load_result(study, spec) is None]
    for spec, result in tqdm(pool.imap_unordered(work, missing), title, total=len(missing), unit="run"):
        save_result(study, spec, result)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", type=Path)
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    options = parser.parse_args()
    study = load_study(options.study)
    rows = settings(study)
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        run_missing(study, [spec for row in rows for spec in trials(study, row)], pool, "Choosing strengths")
        run_missing(study, [spec for row in rows for spec in tests(study, row)], pool, "Measuring")


if __name__ == "__main__":
    main()
