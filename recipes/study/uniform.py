"""Run and render the study of uniform quantization: after training, and in training with learned grids.

    python recipes/study/uniform.py recipes/study/uniform.yaml              # run what is missing, then write README.md
    python recipes/study/uniform.py recipes/study/uniform.yaml --render [--check]

Interrupt it at any time: finished runs stay, and the next start goes on.
"""

import copy
import multiprocessing
import os
import sys
import tempfile
from itertools import product
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from matplotlib.figure import Figure
from results import load_result, save_result
from tables import run_and_publish, spread
from tqdm import tqdm

from hf_r2.report.tables import markdown_table

Cell = dict[str, Any]


def start_of(study: dict[str, Any], start: str, seed: int, split: str) -> Cell:
    """Specify a float start completely."""
    shared = {key: study[key] for key in ("model", "grain", "start_training", "first_and_last")}
    return {"start": start, "restriction": study["starts"][start], "seed": seed, "split": split, **shared}


def post_training_cell(study: dict[str, Any], start: str, seed: int, bits: int, method: str) -> Cell:
    """Specify one run completely: whatever changes its result is in it."""
    setting = study["post_training"]
    chosen = {"bits": bits, "method": setting["methods"][method], "calibration": setting["calibration"]}
    return {**start_of(study, start, seed, "test"), **chosen}


def trained_cell(study: dict[str, Any], start: str, seed: int, bits: int, method: str, rate: float, split: str) -> Cell:
    setting = study["trained"]
    chosen = {"bits": bits, "method": setting["methods"][method], "training": setting["training"]}
    return {**start_of(study, start, seed, split), **chosen, "learning_rate": rate}


def trained_rows(study: dict[str, Any]) -> list[tuple[str, int, str]]:
    """List start, bits and method of everything that is trained."""
    return list(product(study["starts"], study["trained"]["bits"], study["trained"]["methods"]))


def trials(study: dict[str, Any], start: str, bits: int, method: str) -> list[Cell]:
    """List the cells that a row's learning rate is chosen from."""
    rates = study["trained"]["learning_rates"]
    return [trained_cell(study, start, study["seeds"][0], bits, method, rate, "validation") for rate in rates]


def chosen_rate(study: dict[str, Any], start: str, bits: int, method: str) -> float | None:
    """Return the learning rate that is best on the validation split; None while a trial is missing."""
    results = [load_result(study, trial) for trial in trials(study, start, bits, method)]
    if None in results:
        return None
    best = max(range(len(results)), key=lambda index: results[index]["accuracy"])
    return study["trained"]["learning_rates"][best]


def tests(study: dict[str, Any]) -> list[Cell]:
    """List the cells on the test split, as far as learning rates are chosen."""
    setting = study["post_training"]
    rows = product(study["starts"], study["seeds"], setting["bits"], setting["methods"])
    cells = [post_training_cell(study, *row) for row in rows]
    for start, bits, method in trained_rows(study):
        rate = chosen_rate(study, start, bits, method)
        if rate is not None:
            cells += [trained_cell(study, start, seed, bits, method, rate, "test") for seed in study["seeds"]]
    return cells


def run_start(job: tuple[dict[str, Any], list[Cell]]) -> int:
    """Train the float start that some cells share, quantize it as each of them says, and save their results."""
    import torch
    from datasets.utils.logging import disable_progress_bar
    from examples import accuracy, digits
    from float_models import fit
    from transformers import AutoConfig, AutoModelForImageClassification, set_seed
    from transformers.utils import logging

    torch.set_num_threads(1)
    logging.set_verbosity_error()
    disable_progress_bar()
    study, cells = job
    first = cells[0]
    train, evaluation = digits(first["split"])
    set_seed(first["seed"])
    start = AutoModelForImageClassification.from_config(AutoConfig.for_model(**copy.deepcopy(first["model"])))
    spec = {"grain": first["grain"], "training": first["start_training"], "seed": first["seed"]}
    fit(start, train, spec, first["restriction"])
    floats = accuracy(start, evaluation)
    for spec in cells:
        quantize = quantize_after if "calibration" in spec else quantize_in_training
        model = quantize(copy.deepcopy(start), spec, train)
        save_result(study, spec, {"float": floats, **measured(model, train, evaluation)})
    return len(cells)


def measured(model: Any, train: Any, evaluation: Any) -> dict[str, float]:
    """Measure a quantized model as it is, and with batch norm re-estimated."""
    from examples import accuracy

    from hf_r2.refine import reestimate_batch_norm

    as_it_is = accuracy(model, evaluation)
    reestimate_batch_norm(model, train.images())
    return {"accuracy": as_it_is, "accuracy_bn": accuracy(model, evaluation)}


def quantization(spec: Cell) -> Any:
    from hf_r2 import R2QuantizationConfig

    options = copy.deepcopy(spec["method"])
    if "activations" in options:
        options["activations"]["skip"] = spec["first_and_last"]
    overrides = {pattern: {"bits": 8} for pattern in spec["first_and_last"]}
    return R2QuantizationConfig("uniform", spec["bits"], spec["grain"], overrides=overrides, **options)


def quantize_after(model: Any, spec: Cell, train: Any) -> Any:
    from hf_r2 import R2Quantizer

    images = train.tensors["pixel_values"][: spec["calibration"]]
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/float")
        quantizer = R2Quantizer.from_pretrained(f"{directory}/float")
        batches = [{"pixel_values": batch} for batch in images.split(64)]
        return quantizer.quantize(f"{directory}/quantized", quantization(spec), batches)


def quantize_in_training(model: Any, spec: Cell, train: Any) -> Any:
    from float_models import fit
    from transformers import set_seed

    set_seed(spec["seed"])
    fit(model, train, spec, {"learning_rate": spec["learning_rate"]}, quantization(spec))
    return model


def run_missing(study: dict[str, Any], cells: list[Cell], pool: Pool, title: str) -> None:
    jobs: dict[tuple, list[Cell]] = {}
    for spec in cells:
        if load_result(study, spec) is None:
            jobs.setdefault((spec["start"], spec["seed"], spec["split"]), []).append(spec)
    with tqdm(desc=title, total=sum(map(len, jobs.values())), unit="run") as bar:
        for count in pool.imap_unordered(run_start, [(study, job) for job in jobs.values()]):
            bar.update(count)


def run(study: dict[str, Any], processes: int) -> None:
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        run_missing(study, [spec for row in trained_rows(study) for spec in trials(study, *row)], pool, "Choosing")
        run_missing(study, tests(study), pool, "Measuring")


# --- rendering -------------------------------------------------------------------------------------------------------


def render(study: dict[str, Any]) -> str:
    """Render the table of what is quantized after training, and that of what is trained."""
    bits, methods = study["post_training"]["bits"], study["post_training"]["methods"]
    rows = []
    for start, method in product(study["starts"], methods):
        runs = [post_training_results(study, start, width, method) for width in bits]
        floats = figures(runs[0], "float")
        cells = [figures(found, key) for found in runs for key in ("accuracy", "accuracy_bn")]
        rows.append((start, method, floats, *cells))
    header = ("start", "method", "float")
    header += tuple(f"W{width}{kind}" for width in bits for kind in ("", ", BN"))
    intro = f"**After training**: accuracy in %, grain {study['grain']}, float inputs. BN: batch norm re-estimated."
    parts = [intro, markdown_table(header, rows)]
    rows = []
    for start, width, method in trained_rows(study):
        runs, rate = trained_results(study, start, width, method)
        inputs = study["trained"]["methods"][method]["activations"]["bits"]
        name = f"{method} W{width}A{inputs}"
        rows.append((start, name, f"{rate:g}", *(figures(runs, key) for key in ("float", "accuracy", "accuracy_bn"))))
    header = ("start", "method", "learning rate", "float", "quantized", "quantized, BN re-estimated")
    parts += [f"**In training**: accuracy in %, grain {study['grain']}.", markdown_table(header, rows)]
    return "\n\n".join(parts)


def figures(runs: list[dict[str, float]], key: str) -> str:
    return spread([100 * run[key] for run in runs])


def post_training_results(study: dict[str, Any], start: str, bits: int, method: str) -> list[dict[str, float]]:
    return complete(study, [post_training_cell(study, start, seed, bits, method) for seed in study["seeds"]])


def trained_results(study: dict[str, Any], start: str, bits: int, method: str) -> tuple[list[dict[str, float]], float]:
    rate = chosen_rate(study, start, bits, method)
    if rate is None:
        raise SystemExit(f"trials of {start}, {method} are missing: python recipes/study/uniform.py")
    cells = [trained_cell(study, start, seed, bits, method, rate, "test") for seed in study["seeds"]]
    return complete(study, cells), rate


def complete(study: dict[str, Any], cells: list[Cell]) -> list[dict[str, float]]:
    runs = [load_result(study, spec) for spec in cells]
    if None in runs:
        raise SystemExit(f"runs of {cells[0]['start']}, {cells[0]['method']} are missing: recipes/study/uniform.py")
    return runs


def draw(study: dict[str, Any]) -> Figure:
    """Draw accuracy by bits after training, one panel per start, a line per method and a dot per seed."""
    bits, starts = study["post_training"]["bits"], list(study["starts"])
    figure = Figure(figsize=(3.6 * len(starts), 3.4), layout="constrained")
    axes = figure.subplots(1, len(starts), sharey=True, squeeze=False)[0]
    for axis, start in zip(axes, starts, strict=True):
        for index, method in enumerate(study["post_training"]["methods"]):
            runs = [post_training_results(study, start, width, method) for width in bits]
            means = [100 * sum(run["accuracy"] for run in found) / len(found) for found in runs]
            axis.plot(range(len(bits)), means, color=f"C{index}", label=method)
            for place, found in enumerate(runs):
                axis.plot([place] * len(found), [100 * run["accuracy"] for run in found], ".", color=f"C{index}")
        axis.set_title(start)
        axis.set_xticks(range(len(bits)), [f"W{width}" for width in bits])
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    return figure


def main() -> None:
    run_and_publish(__doc__, "uniform.py", run, render, draw)


if __name__ == "__main__":
    main()
