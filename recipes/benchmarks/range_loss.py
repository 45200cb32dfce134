"""What range losses and projections cost beside a training step: ratios to the step's time, never pass or fail.

python recipes/benchmarks/range_loss.py                    # measure on the CPU, with one thread
python recipes/benchmarks/range_loss.py --device cuda
python recipes/benchmarks/range_loss.py --render           # write the tables of README.md from results/
python recipes/benchmarks/range_loss.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import measuring
from benchmarks.measuring import HERE, extra_bytes, milliseconds
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, ResNetConfig, ResNetForImageClassification

from hf_r2 import RangeLoss, RangeProjection
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- range_loss -->", "<!-- end -->"
STEP, READ, READ_AND_WRITE = "none", "amax and amin", "two sums and grad.add_(w)"
# Variant, kind of range loss, its other settings, share of the elements that the margins leave outside
LOSSES: list[tuple[str, str, dict[str, Any], float]] = [
    ("l_inf tensor", "l_inf", {}, 0),
    ("l_inf tensor, autograd", "l_inf", {}, 0),
    ("l_inf channel", "l_inf", {"grain": "channel"}, 0),
    ("margin max, nothing outside", "margin", {}, 0),
    ("margin sum, nothing outside", "margin", {"margin_reduction": "sum"}, 0),
    ("margin sum, 0.05 % outside", "margin", {"margin_reduction": "sum"}, 0.0005),
    ("margin sum, 5 % outside", "margin", {"margin_reduction": "sum"}, 0.05),
    ("margin sum, 5 % outside, autograd", "margin", {"margin_reduction": "sum"}, 0.05),
    ("soft_min_max tensor, eager", "soft_min_max", {}, 0),
    ("soft_min_max tensor, compiled", "soft_min_max", {}, 0),
    ("soft_min_max tensor, autograd", "soft_min_max", {}, 0),
    ("soft_min_max channel, eager", "soft_min_max", {"grain": "channel"}, 0),
    ("tail", "tail", {}, 0),
    ("kurtosis", "kurtosis", {}, 0),
]
MODELS = ("resnet18", "bert-base")
CLIP, FEW, STEADY = "clip 1.5", "prox, few at the limit", "prox, steady state"
FUSED = f"{STEADY}, compiled"
# At most, in % of resnet18's step on a CPU
BARS = {"l_inf tensor": 1.5, "l_inf channel": 3, "margin max, nothing outside": 1.5, "margin sum, nothing outside": 1.5}
BARS |= {"margin sum, 5 % outside": 6, "soft_min_max tensor, compiled": 8, CLIP: 3, FEW: 3, STEADY: 3, FUSED: 3}
# And on a CUDA device, where nothing needs torch.compile
CUDA_BARS = {name: 1 if bar == 1.5 else 2 for name, bar in BARS.items() if not name.endswith("compiled")}
CUDA_BARS["soft_min_max tensor, eager"] = 2


def build(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """Build a model of random weights, and a batch for it."""
    if name == "bert-base":
        batch = {"input_ids": torch.randint(BertConfig().vocab_size, (8, 128)), "labels": torch.randint(2, (8,))}
        return BertForSequenceClassification(BertConfig()), batch
    sizes = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
    batch = {"pixel_values": torch.randn(32, 3, 64, 64), "labels": torch.randint(1000, (32,))}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=1000)), batch


class Variant(NamedTuple):
    """What is timed; `expected(index, weight)` is what one weight's gradient, or its change, should be."""

    name: str
    run: Callable[[], object]
    expected: Callable[[int, Tensor], Tensor] | None = None
    prepare: Callable[[], object] = lambda: None
    floor: str = READ_AND_WRITE


def plain_loss(loss: RangeLoss, index: int, weight: Tensor) -> Tensor:
    """Compute the loss of one weight as one would write it for autograd."""
    groups = weight.flatten(1) if loss.grain == "channel" else weight.view(1, -1)
    key = list(loss.selection)[index].replace(".", "/")
    values = loss.learnable[key].to(weight.dtype) if key in loss.learnable else None
    match loss.kind:
        case "l_inf":
            return groups.abs().amax(dim=1).sum()
        case "margin":  # the sum; with nothing outside, that is the largest, too
            return (values + (groups.abs() - values[:, None]).relu().sum(dim=1)).sum()
        case "soft_min_max":
            rms = groups.detach().square().mean(dim=1).sqrt()
            exponents = groups * (values / rms)[:, None]
            ends = (groups * exponents.softmax(dim=1)).sum(dim=1) - (groups * (-exponents).softmax(dim=1)).sum(dim=1)
            return (ends + rms * torch.exp(-values)).sum()
        case "tail":
            return groups.abs().topk(math.ceil(0.01 * groups.shape[1]), dim=1).values.mean(dim=1).sum()
        case "kurtosis":
            centred = groups - groups.mean(dim=1, keepdim=True)
            return (centred.pow(4).mean(dim=1) / centred.square().mean(dim=1).square() - 1.8).square().sum()


def plain_gradient(loss: RangeLoss, index: int, weight: Tensor) -> Tensor:
    return torch.autograd.grad(plain_loss(loss, index, weight.requires_grad_()), weight)[0]


def plain_change(t: Tensor | None, index: int, weight: Tensor) -> Tensor:
    """Compute what a projection adds to one weight: prox, or clip without t."""
    limit = 1.5 * weight.square().mean().sqrt()
    if t is not None:
        sums = weight.abs().flatten().sort(descending=True).values.cumsum(0)
        limit = ((sums - t[index]) / torch.arange(1, len(sums) + 1, device=weight.device)).amax().clamp_min(0)
    return weight.clamp(-limit, limit) - weight


def loss_variants(model: nn.Module, weights: Sequence[Tensor]) -> list[Variant]:
    """Every range loss in place, as the Trainer runs it, and some in plain autograd."""

    def in_place(loss: RangeLoss) -> None:
        loss.measure()
        loss.accumulate_grad_()

    def by_autograd(loss: RangeLoss) -> None:
        sum(plain_loss(loss, index, weight) for index, weight in enumerate(weights)).backward()

    variants = []
    for name, kind, settings, outside in LOSSES:
        loss = RangeLoss(model, kind, **settings)
        for weight_name, weight in zip(loss.selection, weights, strict=True) if outside else ():
            level = weight.detach().abs().flatten().kthvalue(math.ceil((1 - outside) * weight.numel())).values
            loss.learnable[weight_name.replace(".", "/")].data.fill_(level)
        if name.endswith("compiled"):
            loss.compile()
        run = by_autograd if name.endswith("autograd") else in_place
        floor = READ_AND_WRITE if kind in ("soft_min_max", "kurtosis") else READ
        variants.append(Variant(name, partial(run, loss), partial(plain_gradient, loss), floor=floor))
    return variants


@torch.no_grad()
def projection_variants(model: nn.Module, weights: Sequence[Tensor], fresh: Sequence[Tensor]) -> list[Variant]:
    """Clip and prox of random weights, and prox of weights that many steps have flattened."""
    limits = [1.5 * weight.square().mean().sqrt() for weight in fresh]

    def train_on() -> None:
        """Flatten the weights and move them as an optimizer step would."""
        moves = (torch.randn_like(start) * 0.01 * limit for start, limit in zip(fresh, limits, strict=True))
        assign(weights, (start.clamp(-at, at) + move for start, at, move in zip(fresh, limits, moves, strict=True)))

    train_on()
    # In steady state, prox takes away what the optimizer has pushed beyond the limit
    steady = torch.stack([(w.abs() - at).relu().sum() for w, at in zip(weights, limits, strict=True)]).double()
    few = torch.full_like(steady, 0.03)
    clip, first, later, fused = (RangeProjection(model, kind, clip=1.5) for kind in ("clip", "prox", "prox", "prox"))
    fused.compile()
    return [
        Variant(CLIP, clip.step, partial(plain_change, None)),
        Variant(FEW, partial(first.step, few), partial(plain_change, few)),
        Variant(STEADY, partial(later.step, steady), partial(plain_change, steady), train_on),
        Variant(FUSED, partial(fused.step, steady), partial(plain_change, steady), train_on),
    ]


@torch.no_grad()
def assign(weights: Iterable[Tensor], values: Iterable[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.copy_(value)


def gradient_error(variant: Variant, weights: Sequence[Tensor]) -> float:
    """Relative L2 distance from plain autograd in float64, the largest over the weights."""
    starts, errors = [weight.detach().clone() for weight in weights], []
    for weight in weights:
        weight.grad = torch.zeros_like(weight)
    variant.run()
    for index, (weight, start) in enumerate(zip(weights, starts, strict=True)):
        expected = variant.expected(index, start.double())
        found = weight.grad + (weight.detach() - start)  # a loss writes the one, a projection the other
        errors.append((found - expected).norm().item() / (expected.norm().item() or 1.0))
    return max(errors)


def measure(model: nn.Module, batch: Mapping[str, Tensor], repetitions: int, bars: Mapping[str, float]) -> dict:
    """Measure every variant on a model, taking turns with its training step."""
    cuda = next(model.parameters()).is_cuda
    weights = [getattr(*place) for place in RangeLoss(model).selection.values()]
    for weight in weights:  # normal ones; those of a linear layer have the kurtosis that is the target
        nn.init.normal_(weight, std=weight.std().item())
    fresh = [weight.detach().clone() for weight in weights]
    elements = sum(weight.numel() for weight in weights)
    # Learning rate 0: the same work, and the weights stay those that the margins were set for
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    def prepared(variant: Variant) -> Callable[[], object]:
        assign(weights, fresh)
        variant.prepare()
        return variant.run

    step()
    variants = loss_variants(model, weights) + projection_variants(model, weights, fresh)
    if cuda:  # kernels are compiled in the first run, and recorded in the next two
        variants = [variant for variant in variants if not variant.name.endswith("compiled")]
        for run in (prepared(variant) for variant in variants for _ in range(4)):
            run()
    assign(weights, fresh)
    rows = []
    for variant in variants:
        variant.prepare()
        error = gradient_error(variant, weights)
        memory = extra_bytes(prepared(variant), cuda) / (4 * elements)
        assign(weights, fresh)
        rows.append({"variant": variant.name, "memory_in_w": memory, "gradient_error": error})
    read = Variant(READ, lambda: [(weight.amax(), weight.amin()) for weight in fresh])
    pairs = list(zip(weights, fresh, strict=True))
    write = Variant(READ_AND_WRITE, lambda: [(w.sum(), w.sum(), weight.grad.add_(w)) for weight, w in pairs])
    timed = [Variant(STEP, step), read, write, *variants]
    rounds = [[milliseconds(prepared(variant), cuda) for variant in timed] for _ in range(repetitions)]
    times = {variant.name: each for variant, each in zip(timed, zip(*rounds, strict=True), strict=True)}
    for variant, row in zip(variants, rows, strict=True):
        ms = row["ms"] = median(times[variant.name])
        row["overhead_percent_median"] = 100 * ms / median(times[STEP])
        row["overhead_percent_min"] = 100 * min(times[variant.name]) / min(times[STEP])
        row["multiple_of_floor"] = ms / median(times[variant.floor])
        row["bar_percent"] = bars.get(variant.name)
    floors = {name: median(times[name]) for name in (READ, READ_AND_WRITE)}
    return {"elements": elements, "step_ms": median(times[STEP]), "floors_ms": floors, "rows": rows}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    header = ("variant", "bar", "verdict", "% of the step", "least %", "ms", "× floor", "memory in W", "gradient error")
    cells = []
    for row in rows:
        bar, overhead = row["bar_percent"], row["overhead_percent_median"]
        verdict = ("", "") if bar is None else (f"≤ {bar} %", "met" if overhead <= bar else "missed")
        figures = [overhead, row["overhead_percent_min"], row["ms"], row["multiple_of_floor"]]
        memory, error = f"{row['memory_in_w']:.3f}", f"{row['gradient_error']:.0e}"
        cells.append((row["variant"], *verdict, *(f"{figure:.2f}" for figure in figures), memory, error))
    return markdown_table(header, cells)


def render(result: Mapping[str, Any]) -> str:
    """Render the results of one device."""
    facts = (
        "{device}, {threads} thread(s), torch {torch}, hf_r2 {hf_r2}, commit {commit}, {date}, {repetitions} rounds."
    )
    parts = [facts.format(**result)]
    for name, model in result["models"].items():
        floors = "; ".join(f"{floor}: {ms:.2f} ms" for floor, ms in model["floors_ms"].items())
        parts += [f"**{name}**, {model['elements']:,} elements. Step: {model['step_ms']:.0f} ms. Floors: {floors}."]
        parts += [table(model["rows"])]
    return "\n\n".join(parts)


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("range_loss-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="default: results/range_loss-<device>.json beside this file")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "range_loss.py")
    torch.set_num_threads(options.threads)
    cuda = options.device == "cuda"
    result = {**measuring.facts(options.threads, cuda), "repetitions": options.repetitions, "models": {}}
    for name in options.models:
        torch.manual_seed(0)
        model, batch = build(name)
        batch = {key: value.to(options.device) for key, value in batch.items()}
        bars = (CUDA_BARS if cuda else BARS) if name == "resnet18" else {}
        result["models"][name] = measure(model.to(options.device).train(), batch, options.repetitions, bars)
    measuring.save(result, options.output or HERE / "results" / f"range_loss-{options.device}.json")
    print(render(result))


if __name__ == "__main__":
    main()
