"""What DKM costs beside coremltools' DKMPalettizer and beside a dense step: ratios, never pass or fail.

pip install -c constraints.txt -e ".[bench]"
python recipes/benchmarks/dkm.py                    # measure on the CPU, with one thread
python recipes/benchmarks/dkm.py --threads 2
python recipes/benchmarks/dkm.py --render           # write the tables of README.md from results/
python recipes/benchmarks/dkm.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import dkm_peer, measuring
from benchmarks.measuring import HERE
from benchmarks.range_loss import build
from torch import Tensor, nn
from torch.nn.utils import parametrize
from tqdm import tqdm

from hf_r2 import R2QuantizationConfig, attach
from hf_r2.aware.soft_kmeans import soft_kmeans
from hf_r2.codecs.kmeans import kmeans_1d
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- dkm -->", "<!-- end of dkm -->"
TEMPERATURE, SPREAD, ITERATIONS, MANY = 1e-4, 0.03, 3, 20
DENSE, OURS, OURS_FUSED, OURS_MANY = "dense", "ours", "ours, fused", "ours, 20 iterations"
PEER, PEER_BATCH, PEER_DEFAULT = "coremltools", "coremltools, batch mode", "coremltools, defaults"
PEER_EXACT = "coremltools, prune_threshold 0"
BLOCK_MS, LEAST_ROUNDS, MOST_ROUNDS = 250, 3, 15
PEAK_IN_W, MANY_OVER_FEW, MODEL_PEAK = 3.5, 1.7, 2.4  # at most
MODEL_STEP = {1: 1.5, 2: 1.5, 4: 1.6}  # at most, by bits
GRADIENT = {1e-4: 1e-4, 1e-5: 5e-4}  # at most, by temperature
Call = Callable[..., Any]


class Case(NamedTuple):
    """A square layer and how it is palettized; `faster` is the bar on one thread and on two."""

    bits: int
    faster: tuple[float, float]
    rows: int | None = None
    dim: int = 1
    width: int = 1024

    @property
    def name(self) -> str:
        """Name the row."""
        grain = {None: "", 1: ", every row"}.get(self.rows, f", {self.rows} rows")
        return f"{self.bits} bit{grain}{f', d = {self.dim}' if self.dim > 1 else ''}"

    @property
    def groups(self) -> int:
        """How many look-up tables there are."""
        return self.width // (self.rows or self.width)

    @property
    def tables(self) -> bool:
        """Whether there are look-up tables of enough scalars for ours to have passes that can be fused."""
        return self.dim == 1 and self.rows != 1

    @property
    def scalar(self) -> bool:
        """Whether there is one look-up table of scalars."""
        return self.rows is None and self.dim == 1


CASES = [
    *(Case(bits, faster) for bits, faster in ((1, (30, 22)), (2, (60, 40)), (4, (150, 162)))),
    *(Case(bits, (least, least), rows=rows) for rows, least in ((32, 25), (1, 8)) for bits in (2, 4)),
    *(Case(bits, (least, least), dim=dim) for dim, least in ((2, 6), (4, 3)) for bits in (2, 4)),
]


def start_centroids(bits: int, dim: int, weight: Tensor, groups: int) -> Tensor:
    """Choose the centroids `(groups, 2^bits, dim)` of both sides: the optimum, or some of the vectors themselves."""
    block = weight.detach().reshape(groups, -1)
    if dim == 1:
        return kmeans_1d(block, 2**bits)[..., None]
    vectors = block.view(groups, -1, dim)
    return vectors[:, torch.linspace(0, vectors.shape[1] - 1, 2**bits).long()]


def random_layer(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(0)
    layer = nn.Linear(columns, rows, bias=False)
    nn.init.normal_(layer.weight, std=SPREAD)
    return layer


class SoftWeight(nn.Module):
    """Parametrization by `soft_kmeans` of row groups, which begins where the last step ended."""

    def __init__(self, centroids: Tensor, iterations: int, compiled: bool = False) -> None:
        super().__init__()
        self.centroids = centroids.squeeze(2) if centroids.shape[2] == 1 else centroids
        self.options = {"absolute": True, "iterations": iterations, "tolerance": 0.0, "compiled": compiled}

    def forward(self, weight: Tensor) -> Tensor:
        """Return the soft weight."""
        block = weight.view(len(self.centroids), -1)
        soft = soft_kmeans(block, self.centroids, TEMPERATURE, **self.options)
        self.centroids = soft.centroids.detach()
        return soft.weights.view_as(weight)


def layer_step(case: Case, variant: str, options: Mapping[str, Any]) -> Call:
    """Prepare forward and backward of one layer, for a batch so small that the weight is all that counts."""
    model = nn.Sequential(random_layer(case.width, case.width))
    start = partial(start_centroids, case.bits, case.dim)
    if variant in (PEER, PEER_BATCH, PEER_DEFAULT):
        dkm_peer.palettize(model, start, case.bits, case.dim, case.rows, **options)
    elif variant != DENSE:
        soft = SoftWeight(start(model[0].weight, case.groups), **options)
        parametrize.register_parametrization(model[0], "weight", soft, unsafe=True)
    batch, upstream = torch.randn(2, 2, case.width)

    def step() -> None:
        model(batch).backward(upstream)
        model.zero_grad()  # last, so that gradients count as memory of the step

    return step


def palettize_ours(model: nn.Module, bits: int, compiled: bool = False) -> int:
    """Attach DKM to a whole model; return how many elements it palettizes."""
    options = {"temperature": TEMPERATURE, "absolute": True, "iterations": ITERATIONS, "tolerance": 0.0}
    attach(model, R2QuantizationConfig("palette", bits, "tensor", aware="dkm", aware_options=options))
    layers = [module for module in model.modules() if parametrize.is_parametrized(module, "weight")]
    if compiled:
        for layer in layers:
            layer.parametrizations.weight[0].compile()
    return sum(layer.parametrizations.weight.original.numel() for layer in layers)


def palettize_peer(model: nn.Module, bits: int) -> int:
    dkm_peer.palettize(model, partial(start_centroids, bits, 1), bits, **dkm_peer.FORCED)
    return sum(module.weight.numel() for module in dkm_peer.palettized(model))


def model_step(bits: int, palettize: Callable[[nn.Module, int], int] | None, name: str = "resnet18") -> Call:
    """Prepare a whole training step of a model of random weights."""
    torch.manual_seed(0)
    model, batch = build(name)
    model.train()
    expected = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear | nn.Conv2d))
    if palettize and palettize(model, bits) != expected:
        raise RuntimeError(f"weights of {name} were left dense, so its time would say nothing")
    # Learning rate 0: the same work, and the weights stay as they are
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def unrolled_gradient(weight: Tensor, centroids: Tensor, temperature: float, upstream: Tensor) -> Tensor:
    """Differentiate through all iterations of scalar DKM, in float64."""
    values, centroids = weight.detach().double().flatten().requires_grad_(), centroids.double().flatten()
    for _ in range(ITERATIONS):
        attention = (-(values - centroids[:, None]).square() / temperature).softmax(0)
        centroids = attention @ values / attention.sum(1)
    (centroids @ attention).backward(upstream.double().flatten())
    return values.grad.view_as(weight)


def gradient_error(bits: int, temperature: float, rows: int, peer_options: Mapping[str, Any] | None) -> float:
    """Relative L2 distance from the unrolled float64 gradient, of ours or of the peer with these options."""
    model = nn.Sequential(random_layer(rows, 1024))
    weight, start = model[0].weight, partial(start_centroids, bits, 1)
    # A part that depends on the weight, since the centroids' own gradients cancel in one that does not
    upstream = torch.randn_like(weight) + 1 + weight.detach() / SPREAD
    centroids = start(weight, 1)
    expected = unrolled_gradient(weight, centroids, temperature, upstream)
    if peer_options is None:
        options = {"absolute": True, "iterations": ITERATIONS, "tolerance": 0.0}
        found = soft_kmeans(weight.view(1, -1), centroids.squeeze(2), temperature, **options).weights
    else:
        dkm_peer.palettize(model, start, bits, palett_tau=temperature, **dkm_peer.FORCED, **peer_options)
        weight = model[0].weight
        found = model[0].weight_fake_quant(weight)
    found.backward(upstream.view_as(found))
    return ((weight.grad - expected).norm() / expected.norm()).item()


# What follows runs in the process of one side; its steps stay there from one call to the next
_steps: dict[str, Call] = {}


def begin(threads: int) -> None:
    torch.set_num_threads(threads)


def load(name: str, make: Call, *arguments: Any) -> float:
    """Prepare a step, and take it twice; return the milliseconds of the second, as the first one sets things up."""
    _steps[name] = make(*arguments)
    _steps[name]()
    return measuring.milliseconds(_steps[name], cuda=False)


def peak(name: str) -> int:
    return measuring.extra_bytes(_steps[name], cuda=False)


def timed(name: str, repetitions: int) -> float:
    """Repeat a step; return the milliseconds of one."""

    def block() -> None:
        for _ in range(repetitions):
            _steps[name]()

    return measuring.milliseconds(block, cuda=False) / repetitions


def forget() -> None:
    _steps.clear()
    gc.collect()


class Side:
    """A process of its own that does one thing at a time."""

    def __init__(self, threads: int) -> None:
        self.pool = ProcessPoolExecutor(1, get_context("spawn"), initializer=begin, initargs=(threads,))

    def __call__(self, function: Call, *arguments: Any) -> Any:
        """Have it call a function, and wait for what that returns."""
        return self.pool.submit(function, *arguments).result()


class Variant(NamedTuple):
    """A step to time: the side that takes it, and what prepares it there."""

    side: Call
    make: Call
    arguments: tuple[Any, ...]


def compare(variants: Mapping[str, Variant], seconds: float) -> dict[str, Any]:
    """Time variants in turn for about these seconds, after some steps of each to begin with and for its peak memory."""
    first = {name: side(load, name, make, *arguments) for name, (side, make, arguments) in variants.items()}
    peaks = {name: variant.side(peak, name) for name, variant in variants.items()}
    repetitions = {name: max(1, round(BLOCK_MS / ms)) for name, ms in first.items()}
    cost = sum(repetitions[name] * ms for name, ms in first.items()) / 1000
    rounds = min(MOST_ROUNDS, max(LEAST_ROUNDS, round(seconds / cost)))
    times = [{name: v.side(timed, name, repetitions[name]) for name, v in variants.items()} for _ in range(rounds)]
    for side in {id(variant.side): variant.side for variant in variants.values()}.values():
        side(forget)
    ms = {name: median(each[name] for each in times) for name in variants}
    return {"rounds": rounds, "ms": ms, "bytes": peaks}


def layer_variants(case: Case, ours: Call, peer: Call | None) -> dict[str, Variant]:
    variants: dict[str, tuple[Call | None, dict[str, Any]]] = {
        DENSE: (ours, {}),
        OURS: (ours, {"iterations": ITERATIONS}),
        **({OURS_FUSED: (ours, {"iterations": ITERATIONS, "compiled": True})} if case.tables else {}),
        OURS_MANY: (ours, {"iterations": MANY}),
        PEER: (peer, dkm_peer.FORCED),
        PEER_DEFAULT: (peer, {}),
    }
    if case.rows is not None:
        variants[PEER_BATCH] = peer, {**dkm_peer.FORCED, "palett_batch_mode": True}
    return {
        name: Variant(side, layer_step, (case, name, options))
        for name, (side, options) in variants.items()
        if side is not None
    }


def model_variants(bits: int, ours: Call, peer: Call) -> dict[str, Variant]:
    return {
        DENSE: Variant(ours, model_step, (bits, None)),
        OURS: Variant(ours, model_step, (bits, palettize_ours)),
        OURS_FUSED: Variant(ours, model_step, (bits, partial(palettize_ours, compiled=True))),
        PEER: Variant(peer, model_step, (bits, palettize_peer)),
    }


def measure(cases: Sequence[Case], bits: Sequence[int], ours: Call, peer: Call, seconds: float) -> dict[str, Any]:
    """Measure layers, a model at these bits, and gradients."""
    layers, models, gradients = [], [], []
    with tqdm(total=len(cases) + 2 * len(bits), file=sys.stderr) as progress:
        for case in cases:
            progress.set_description(case.name)
            facts = {"case": case.name, "scalar": case.scalar, "faster": case.faster, "w_bytes": 4 * case.width**2}
            layers.append({**facts, **compare(layer_variants(case, ours, peer), seconds)})
            progress.update()
        for width in bits:
            progress.set_description(f"resnet18, {width} bit")
            models.append({"bits": width, **compare(model_variants(width, ours, peer), seconds)})
            progress.update()
        for width in bits:
            progress.set_description(f"gradients, {width} bit")
            for temperature in GRADIENT:
                sides = {OURS: (ours, None), PEER: (peer, {}), PEER_EXACT: (peer, {"prune_threshold": 0.0})}
                errors = {name: side(gradient_error, width, temperature, 256, o) for name, (side, o) in sides.items()}
                gradients.append({"bits": width, "temperature": temperature, "errors": errors})
            progress.update()
    return {"layers": layers, "models": models, "gradients": gradients}


def at_least(value: float, bar: float) -> tuple[str, str]:
    return f"≥ {bar:g}", "met" if value >= bar else "missed"


def at_most(value: float, bar: float) -> tuple[str, str]:
    return f"≤ {bar:g}", "met" if value <= bar else "missed"


def speed_table(layers: Iterable[Mapping[str, Any]], threads: int) -> str:
    """How many times longer coremltools takes, without and with the dense step, and the times."""
    header = ("layer", "bar", "verdict", "× longer", "fused", "verdict", "whole step", "ours ms", "fused")
    header += (PEER, "batch mode", "defaults", "rounds")
    rows = []
    for layer in layers:
        ms = layer["ms"]
        peer, dense = min(ms[PEER], ms.get(PEER_BATCH, ms[PEER])), ms[DENSE]
        bar = layer["faster"][min(threads, 2) - 1]
        longer, fused = ((peer - dense) / (ms[name] - dense) if name in ms else None for name in (OURS, OURS_FUSED))
        figures = [*at_least(longer, bar), f"{longer:.1f}"]
        figures += [f"{fused:.1f}", at_least(fused, bar)[1]] if fused else ["", ""]
        figures += [f"{peer / ms[OURS]:.1f}", f"{ms[OURS]:.1f}", f"{ms[OURS_FUSED]:.1f}" if fused else ""]
        figures += [f"{ms[name]:.0f}" if name in ms else "" for name in (PEER, PEER_BATCH, PEER_DEFAULT)]
        rows.append((layer["case"], *figures, str(layer["rounds"])))
    return markdown_table(header, rows)


def memory_table(layers: Iterable[Mapping[str, Any]]) -> str:
    """Peak memory in W, and what more iterations cost."""
    header = ("layer", "bar", "verdict", OURS, "20 iterations", DENSE, PEER, "defaults", "20 / 3", "bar", "verdict")
    rows = []
    for layer in layers:
        ms, peaks = layer["ms"], {name: held / layer["w_bytes"] for name, held in layer["bytes"].items()}
        more = (ms[OURS_MANY] - ms[DENSE]) / (ms[OURS] - ms[DENSE])
        verdict = at_most(max(peaks[OURS], peaks[OURS_MANY]), PEAK_IN_W)
        figures = (f"{peaks[name]:.2f}" for name in (OURS, OURS_MANY, DENSE, PEER, PEER_DEFAULT))
        bar = at_most(more, MANY_OVER_FEW) if layer["scalar"] else ("", "")
        rows.append((layer["case"], *verdict, *figures, f"{more:.2f}", *bar))
    return markdown_table(header, rows)


def model_table(models: Iterable[Mapping[str, Any]]) -> str:
    """Step and peak memory of a whole model, in multiples of the dense step's."""
    header = ("resnet18", "bar", "verdict", OURS, "fused", "verdict", PEER, "× longer", "peak ours", PEER)
    header += ("bar", "verdict", "rounds")
    rows = []
    for model in models:
        step, fused, peer = (model["ms"][name] / model["ms"][DENSE] for name in (OURS, OURS_FUSED, PEER))
        held, peer_held = (model["bytes"][name] / model["bytes"][DENSE] for name in (OURS, PEER))
        bar = MODEL_STEP[model["bits"]]
        figures = [*at_most(step, bar), f"{step:.2f}", f"{fused:.2f}", at_most(fused, bar)[1], f"{peer:.1f}"]
        figures += [f"{(peer - 1) / (step - 1):.0f}", f"{held:.2f}", f"{peer_held:.1f}", *at_most(held, MODEL_PEAK)]
        rows.append((f"{model['bits']} bit", *figures, str(model["rounds"])))
    return markdown_table(header, rows)


def gradient_table(gradients: Iterable[Mapping[str, Any]]) -> str:
    """Relative L2 distance from the unrolled gradient in float64."""
    header = ("gradient error", "bar", "verdict", OURS, PEER, PEER_EXACT)
    rows = []
    for gradient in gradients:
        errors = gradient["errors"]
        verdict = at_most(errors[OURS], GRADIENT[gradient["temperature"]])
        name = f"{gradient['bits']} bit, τ = {gradient['temperature']:g}"
        rows.append((name, *verdict, *(f"{errors[side]:.1e}" for side in (OURS, PEER, PEER_EXACT))))
    return markdown_table(header, rows)


def render(result: Mapping[str, Any]) -> str:
    """Render the results of one number of threads."""
    software = "torch {torch}, hf_r2 {hf_r2}, coremltools {coremltools}"
    parts = [("{device}, {threads} thread(s), " + software + ", commit {commit}, {date}.").format(**result)]
    if result["layers"]:
        dense = median(layer["ms"][DENSE] for layer in result["layers"])
        parts += [f"**One layer of 1024 × 1024.** Dense step: {dense:.1f} ms."]
        parts += [speed_table(result["layers"], result["threads"]), memory_table(result["layers"])]
    if result["models"]:
        ms, held = (median(model[figure][DENSE] for model in result["models"]) for figure in ("ms", "bytes"))
        parts += [f"**resnet18.** Dense step: {ms:.0f} ms, {held / 2**20:.0f} MiB.", model_table(result["models"])]
    if result["gradients"]:
        parts += [gradient_table(result["gradients"])]
    return "\n\n".join(parts)


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("dkm-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="*", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--bits", nargs="*", type=int, choices=MODEL_STEP, default=list(MODEL_STEP), help="of resnet18")
    parser.add_argument("--seconds", type=float, default=15, help="to spend on the times of a row, about")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/dkm-cpu-<threads>.json beside this file")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "dkm.py")
    if not find_spec("coremltools"):
        raise SystemExit('coremltools is not installed: pip install -c constraints.txt -e ".[bench]"')
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler of every peak would write two lines
    cases = [case for case in CASES if options.layers is None or case.name in options.layers]
    facts = {**measuring.facts(options.threads), "coremltools": version("coremltools")}
    found = measure(cases, options.bits, Side(options.threads), Side(options.threads), options.seconds)
    result = {**facts, **found}
    measuring.save(result, options.output or HERE / "results" / f"dkm-cpu-{options.threads}.json")
    print(render(result))


if __name__ == "__main__":
    main()
