"""What planned bits are worth beside the same bits for all weights, at the same bytes, on three small trained models.

python recipes/benchmarks/plan.py                    # train what is not trained yet, and measure on the CPU
python recipes/benchmarks/plan.py --models bert --codecs uniform
python recipes/benchmarks/plan.py --render           # write the tables of README.md from results/
python recipes/benchmarks/plan.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import measuring
from benchmarks.measuring import HERE
from benchmarks.plan_models import CASES, DATA, train
from scipy.stats import spearmanr

from hf_r2.codecs import CodecSettings
from hf_r2.planning.calibration import CalibratedModel, Measured
from hf_r2.planning.choices import Choices, Settings, Target
from hf_r2.planning.losses import measured_losses
from hf_r2.planning.search import Point, Search
from hf_r2.planning.source import FloatCheckpoint
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- plan -->", "<!-- end of plan -->"
CODECS = {"palette": "tensor", "uniform": "channel"}
BITS = (2, 3, 4)
EXAMPLES, BATCH = 256, 64
PROXIES = ("SQNR", "noise", "SQNR × elements", "Fisher")
ROW_NAMES = {
    "uniform": "uniform",
    "sqnr": "allocated by SQNR",
    "fisher": "allocated by Fisher",
    "kl": "allocated by KL",
    "plan": "plan",
}


def measure(name: str, source: Path, method: str, examples: int = EXAMPLES) -> dict[str, Any]:
    """Measure one trained model with one codec."""
    start = time.perf_counter()
    parts = DATA[CASES[name].data]()
    checkpoint = FloatCheckpoint(str(source), None, None)
    choices = Choices(checkpoint, method, CODECS[method])
    model = CalibratedModel(str(source), checkpoint, parts.calibration.batches(BATCH, examples))
    evaluate = evaluation(CalibratedModel(str(source), checkpoint, parts.test.batches(BATCH)))
    losses = measured_losses(choices, "kl", model)
    searches = {kind: Search(choices, {kind: own}, None) for kind, own in losses.items()}
    search = Search(choices, dict(reversed(losses.items())), model)
    rows = []
    for bits in BITS:
        uniform = next(point for point in search.uniform if largest_bits(point.settings) == bits)
        target = Target(choices, uniform.file_bytes)
        points = {"uniform": (uniform, None)}
        points |= {kind: each.allocate(target) for kind, each in searches.items()}
        points["kl"] = search.allocate(target)
        points["plan"] = (search.improve(points["kl"][0], target), points["kl"][1])
        rows += [row(bits, kind, point, gap, uniform, evaluate) for kind, (point, gap) in points.items()]
    return {
        "model": name,
        "method": method,
        "grain": CODECS[method],
        "examples": min(examples, len(parts.calibration)),
        "held_out": len(parts.test),
        "float": figures(evaluate(dict.fromkeys(choices.names))),
        "correlations": correlations(checkpoint, losses),
        "rows": rows,
        "seconds": time.perf_counter() - start,
    }


def largest_bits(settings: Settings) -> int:
    return max(own.bits for own in settings.values())


def row(
    bits: int, kind: str, point: Point, gap: float | None, uniform: Point, evaluate: Callable[[Settings], Measured]
) -> dict[str, Any]:
    found = evaluate(point.settings)
    excess, error = found.excess(evaluate(uniform.settings))
    return {
        "bits": bits,
        "kind": kind,
        "bytes": point.file_bytes,
        "gap": gap,
        "settings": {name: own.bits for name, own in point.settings.items()},
        **figures(found),
        "excess": excess,
        "standard_error": error,
        "calibration": None if point.measured is None else figures(point.measured),
    }


def figures(measured: Measured) -> dict[str, float]:
    return {"kl": measured.kl, "loss": measured.cross_entropy, "accuracy": measured.accuracy}


def evaluation(held_out: CalibratedModel) -> Callable[[Mapping[str, CodecSettings | None]], Measured]:
    """Make the function that measures settings on held-out examples; None for all weights is the float model."""
    done: dict[frozenset, Measured] = {}

    def evaluate(settings: Mapping[str, CodecSettings | None]) -> Measured:
        key = frozenset(settings.items())
        if key not in done:
            held_out.compress(settings)
            done[key] = held_out.measure()
        return done[key]

    return evaluate


def correlations(checkpoint: FloatCheckpoint, losses: Mapping[str, Sequence[Sequence[float]]]) -> dict[str, float]:
    """Correlate what stands in for the measured KL divergence with it, by ranks over all choices of all weights."""
    weights = [weight.read().double() for weight in checkpoint.weights.values()]
    factors = {
        "SQNR": [1.0 for _ in weights],
        "noise": [weight.square().sum().item() for weight in weights],
        "SQNR × elements": [float(weight.numel()) for weight in weights],
    }
    proxies = {
        name: [factor * loss for factor, own in zip(each, losses["sqnr"], strict=True) for loss in own]
        for name, each in factors.items()
    }
    proxies["Fisher"] = [loss for own in losses["fisher"] for loss in own]
    measured = [loss for own in losses["kl"] for loss in own]
    return {name: float(spearmanr(values, measured).statistic) for name, values in proxies.items()}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    header = ("at the bytes of", "choice", "verdict", "file bytes", "gap", "KL (nats)", "loss (nats)", "− uniform's")
    cells = []
    for each in rows:
        verdict = "" if each["kind"] != "plan" else "met" if each["excess"] <= 0 else "missed"
        gap = "" if each["gap"] is None else f"{each['gap']:.2%}"
        excess = "" if each["excess"] == 0 else f"{each['excess']:+.4f} ± {each['standard_error']:.4f}"
        losses = (f"{each['kl']:.3g}", f"{each['loss']:.4f}", excess, f"{each['accuracy']:.2%}")
        names = (f"{each['bits']} bits", ROW_NAMES[each["kind"]], verdict)
        cells.append((*names, f"{each['bytes']:,}", gap, *losses))
    return markdown_table((*header, "accuracy"), cells)


def render(result: Mapping[str, Any]) -> str:
    facts = (
        "**{model}, {method}**, grain {grain}: {device}, {threads} thread(s), torch {torch}, hf_r2 {hf_r2}, "
        "commit {commit}, {date}, {seconds:.0f} s; calibrated on {examples} examples, measured on {held_out} "
        "others. Float: loss {loss:.4f}, accuracy {accuracy:.2%}. Rank correlation with KL: {correlation}."
    )
    found = ", ".join(f"{name} {result['correlations'][name]:.3f}" for name in PROXIES)
    return f"{facts.format(**{**result, **result['float'], 'correlation': found})}\n\n{table(result['rows'])}"


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("plan-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--codecs", nargs="+", choices=CODECS, default=list(CODECS))
    parser.add_argument("--examples", type=int, default=EXAMPLES, help="for calibration")
    parser.add_argument("--directory", type=Path, default=Path("outputs/plan"), help="of the float checkpoints")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "plan.py")
    torch.set_num_threads(options.threads)
    for name in options.models:
        source = options.directory / name
        if not source.exists():
            train(CASES[name], source)
        for method in options.codecs:
            result = {**measuring.facts(options.threads), **measure(name, source, method, options.examples)}
            measuring.save(result, HERE / "results" / f"plan-{name}-{method}.json")
            print(render(result))


if __name__ == "__main__":
    main()
