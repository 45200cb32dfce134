"""Run and render the studies of compression-aware training: methods at the same bits, from the same starts.

    python recipes/study/aware.py recipes/study/dkm.yaml                     # run what is missing, then write README.md
    python recipes/study/aware.py recipes/study/dkm.yaml --render [--check]

Interrupt it at any time: finished runs stay, and the next start goes on.
"""

import copy
import multiprocessing
import os
import sys
import warnings
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

from results import load_result, save_result
from tables import run_and_publish, spread
from tqdm import tqdm

from hf_r2.report.tables import markdown_table

SHARED = ("model", "grain", "start_training", "training", "first_and_last")


def methods(study: dict[str, Any]) -> dict[str, Any]:
    """List the methods of a study by name: with settings, or with the name itself."""
    found = study["methods"]
    return found if isinstance(found, dict) else dict(zip(found, found, strict=True))


def cell(study: dict[str, Any], start: str, seed: int, bits: int, method: str) -> dict[str, Any]:
    """Specify one run completely: whatever changes its result is in it."""
    shared = {key: study[key] for key in SHARED if key in study}
    chosen, restriction = methods(study)[method], study["starts"][start]
    return {"start": start, "restriction": restriction, "seed": seed, "bits": bits, "method": chosen, **shared}


def cells(study: dict[str, Any], start: str, seed: int) -> list[dict[str, Any]]:
    return [cell(study, start, seed, bits, method) for bits, method in product(study["bits"], methods(study))]


def run_start(job: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Train the start that some cells share, then compress it as each of them says."""
    import torch
    from examples import accuracy, digits
    from float_models import fit
    from transformers import AutoConfig, AutoModelForImageClassification, set_seed
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.set_verbosity_error()
    train, test = digits("test")
    first = job[0]
    set_seed(first["seed"])
    config = AutoConfig.for_model(**copy.deepcopy(first["model"]))
    start = AutoModelForImageClassification.from_config(config)
    spec = {"grain": "tensor", "training": first["start_training"], "seed": first["seed"]}
    fit(start, train, spec, first["restriction"])
    floats = accuracy(start, test)
    return [(spec, {"float": floats, **compress(copy.deepcopy(start), spec, train, test)}) for spec in job]


def compress(model: Any, spec: dict[str, Any], train: Any, test: Any) -> dict[str, float]:
    """Compress a float model by the method of a cell, and measure it as trained and with batch norm re-estimated."""
    from examples import accuracy

    from hf_r2.refine import reestimate_batch_norm

    dkm = {"k-means": by_kmeans, "hf_r2": by_hf_r2, "coremltools": by_coremltools}
    run_method = by_least_squares if isinstance(spec["method"], dict) else dkm[spec["method"]]
    model = run_method(model, spec, train)
    measured = {"accuracy": accuracy(model, test)}
    reestimate_batch_norm(model, train.images())
    return {**measured, "accuracy_bn": accuracy(model, test)}


def by_kmeans(model: Any, spec: dict[str, Any], train: Any) -> Any:
    from hf_r2.quantization import compress

    return compress(model, palettes(spec))


def by_hf_r2(model: Any, spec: dict[str, Any], train: Any) -> Any:
    from loop import steps

    from hf_r2 import attach, finalize

    attach(model, palettes(spec, aware="dkm"))
    for _ in steps(model, spec["training"], spec["seed"], train):
        pass
    return finalize(model)


def by_least_squares(model: Any, spec: dict[str, Any], train: Any) -> Any:
    from loop import steps

    from hf_r2 import R2QuantizationConfig, attach, finalize
    from hf_r2.quantization import compress

    method = spec["method"]
    outer = {f"{layer}.weight": {"bits": spec["first_and_last"]["bits"]} for layer in spec["first_and_last"]["layers"]}
    activations = method.get("activations")
    if activations:
        activations = {**activations, "skip": list(outer)}
    options = {"grain": spec["grain"], "overrides": outer, "activations": activations}
    if not method["trained"]:
        return compress(model, R2QuantizationConfig("least_squares", spec["bits"], **options))
    teacher = copy.deepcopy(model).eval() if method["distilled"] else None
    attach(model, R2QuantizationConfig("least_squares", spec["bits"], aware="least_squares", **options))
    for _ in steps(model, spec["training"], spec["seed"], train, teacher):
        pass
    return finalize(model)


def by_coremltools(model: Any, spec: dict[str, Any], train: Any) -> Any:
    from loop import steps
    from peers import coremltools_dkm

    from hf_r2 import select_weights

    outer = dict.fromkeys(spec["first_and_last"]["layers"], spec["first_and_last"]["bits"])
    bits = {name.removesuffix(".weight"): spec["bits"] for name in select_weights(model)} | outer
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return coremltools_dkm(model, bits, steps(model, spec["training"], spec["seed"], train))


def palettes(spec: dict[str, Any], **options: Any) -> Any:
    from hf_r2 import R2QuantizationConfig

    outer = {f"{layer}.weight": {"bits": spec["first_and_last"]["bits"]} for layer in spec["first_and_last"]["layers"]}
    return R2QuantizationConfig("palette", bits=spec["bits"], grain="tensor", overrides=outer, **options)


def run(study: dict[str, Any], processes: int) -> None:
    jobs = [cells(study, start, seed) for start, seed in product(study["starts"], study["seeds"])]
    missing = [[spec for spec in job if load_result(study, spec) is None] for job in jobs]
    missing = [job for job in missing if job]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for results in tqdm(pool.imap_unordered(run_start, missing), total=len(missing), unit="start"):
            for spec, result in results:
                save_result(study, spec, result)


def render(study: dict[str, Any]) -> str:
    header = ("start", "method", "bits", "float", "compressed", "compressed, BN re-estimated")
    rows = []
    for start, bits, method in product(study["starts"], study["bits"], methods(study)):
        runs = [load_result(study, cell(study, start, seed, bits, method)) for seed in study["seeds"]]
        if None in runs:
            raise SystemExit(f"runs of {start}, {method}, {bits} bits are missing: python recipes/study/aware.py")
        figures = (spread([100 * run[key] for run in runs]) for key in ("float", "accuracy", "accuracy_bn"))
        rows.append((start, method, str(bits), *figures))
    return f"Accuracy in %, grain {study.get('grain', 'tensor')}.\n\n{markdown_table(header, rows)}"


def main() -> None:
    run_and_publish(__doc__, "aware.py", run, render)


if __name__ == "__main__":
    main()
