"""What least-squares binary quantization costs, and how far from the optimum it is: ratios, never pass or fail.

python recipes/benchmarks/least_squares.py                    # measure on the CPU, with one thread
python recipes/benchmarks/least_squares.py --render           # write the tables of README.md from results/
python recipes/benchmarks/least_squares.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch
from benchmarks import measuring
from benchmarks.measuring import HERE, milliseconds
from torch import Tensor

from hf_r2.codecs.binary_bases import fold, levels, nearest_codes, solve, warm_two
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- least_squares -->", "<!-- end of least_squares -->"
SHAPES = {"1 M": (1, 1 << 20), "1024 × 1024": (1024, 1024), "512 × 4608": (512, 4608)}
EXACT, WARM = "two bits, exact", "two bits, warm sweep"
CHANNELS = (27, 576, 2304)
GREEDY_BAR = 1.5
EXACT_BAR = 15  # of one long row


class Variant(NamedTuple):
    """What is timed: our solver, the plain one of the same purpose, and a third one where there is any."""

    name: str
    ours: Callable[[], Tensor]
    plain: Callable[[], Tensor]
    other: Callable[[], Tensor] | None = None
    bar: float | None = None
    comparable: bool = True


def by_sorting(block: Tensor, sort: Callable[[Tensor], Tensor]) -> Tensor:
    """Solve two bits exactly, as one would write it: sort, prefix sums, arg-min over all splits."""
    ordered, n = sort(block.abs()), block.shape[1]
    sums = ordered.cumsum(dim=1, dtype=torch.float64)
    below, above = sums[:, :-1], sums[:, -1:] - sums[:, :-1]
    count = torch.arange(1, n, dtype=torch.float64)
    best = (below**2 / count + above**2 / (n - count)).argmax(dim=1, keepdim=True)
    low = below.gather(1, best)[:, 0] / (best[:, 0] + 1)
    high = above.gather(1, best)[:, 0] / (n - best[:, 0] - 1)
    return torch.stack([(high + low) / 2, (high - low) / 2], dim=1).float()


def torch_sort(values: Tensor) -> Tensor:
    return values.sort(dim=1).values


def numpy_sort(values: Tensor) -> Tensor:
    return torch.from_numpy(np.sort(values.numpy(), axis=1))


def plain_greedy(block: Tensor, bits: int) -> Tensor:
    """Solve greedily, as one would write it."""
    left, scales = block, []
    for _ in range(bits):
        scales.append(left.abs().mean(dim=1, keepdim=True))
        left = left - scales[-1] * torch.where(left >= 0, 1.0, -1.0)  # not sign(), which leaves zeros alone
    return torch.cat(scales, dim=1)


def shortcut(block: Tensor, skip: int) -> Tensor:
    """Solve two bits by a shortcut in use: v_1 is a data value, searched and judged on every skip-th element.

    Of the magnitudes next to which the mean of both sides' means falls, the one of least error; v_2 = mean ||x| − v_1|.
    """
    magnitudes = block.abs().double()
    sample = magnitudes[:, ::skip].sort(dim=1).values
    n = sample.shape[1]
    below, total = sample.cumsum(dim=1)[:, :-1], sample.sum(dim=1, keepdim=True)
    count = torch.arange(1, n, dtype=torch.float64)
    value = sample[:, :-1]
    middle = (below / count + (total - below) / (n - count)) / 2
    distance = (count * value - below) + (total - below - (n - count) * value)
    error = sample.square().sum(dim=1, keepdim=True) - 2 * value * total + n * value**2 - distance**2 / n
    error[(value > middle) | (middle > sample[:, 1:])] = torch.inf
    first = value.gather(1, error.argmin(dim=1, keepdim=True))
    return torch.cat([first, (magnitudes - first).abs().mean(dim=1, keepdim=True)], dim=1).float()


def errors(block: Tensor, scales: Tensor) -> Tensor:
    """Mean squared error of each group at its nearest levels, as a share of its mean square."""
    code = nearest_codes if scales.shape[1] > 2 else fold
    decoded = levels(scales).gather(1, code(block, scales).long()).double()
    return (decoded - block).square().sum(dim=1) / block.double().square().sum(dim=1)


def optimum(block: Tensor) -> Tensor:
    """Least possible error of two bits, likewise, from all splits in float64."""
    ordered, n = block.double().abs().sort(dim=1).values, block.shape[1]
    count = torch.arange(1, n, dtype=torch.float64)
    below, square = ordered.cumsum(dim=1), ordered.square().sum(dim=1)
    saved = below[:, :-1] ** 2 / count + (below[:, -1:] - below[:, :-1]) ** 2 / (n - count)
    return 1 - saved.amax(dim=1) / square


def variants(block: Tensor) -> list[Variant]:
    """Every solver of a block, beside its plain form."""
    sorts = [partial(by_sorting, block, sort) for sort in (torch_sort, numpy_sort)]
    before = solve(block - 0.01 * block.std() * torch.randn_like(block), 2)  # as of the step before, in training
    listed = [
        Variant(EXACT, partial(solve, block, 2), *sorts, EXACT_BAR if len(block) == 1 else None),
        Variant(WARM, partial(warm_two, block, before), sorts[0]),
    ]
    for bits in (2, 3, 4):
        ours, plain = partial(solve, block, bits, "greedy"), partial(plain_greedy, block, bits)
        listed.append(Variant(f"{bits} bits, greedy", ours, plain, bar=GREEDY_BAR if bits == 2 else None))
    for bits in (3, 4):
        ours, plain = partial(solve, block, bits), partial(plain_greedy, block, bits)
        listed.append(Variant(f"{bits} bits, refined", ours, plain, comparable=False))
    return listed


def warm_milliseconds(run: Callable[[], object]) -> float:
    """Time a call after another one, lest it pay for the memory that the side before it gave back."""
    run()
    return milliseconds(run, cuda=False)


def measure(block: Tensor, repetitions: int) -> list[dict[str, Any]]:
    """Measure every variant on a block, the sides taking turns."""
    rows = []
    for variant in variants(block):
        sides = {"ms": variant.ours, "plain_ms": variant.plain, "other_ms": variant.other}
        runs = {name: run for name, run in sides.items() if run}
        error, plain_error = (errors(block, run()).mean().item() for run in (variant.ours, variant.plain))
        rounds = [[warm_milliseconds(run) for run in runs.values()] for _ in range(repetitions)]
        times = {name: median(each) for name, each in zip(runs, zip(*rounds, strict=True), strict=True)}
        facts = {"variant": variant.name, "bar": variant.bar, "comparable": variant.comparable}
        rows.append({**facts, **times, "error": error, "plain_error": plain_error})
    return rows


def compare_channels(n: int, channels: int) -> dict[str, Any]:
    """Divide the errors of two bits on normal channels of n elements by the optimum's: mean and largest."""
    block = torch.randn(channels, n)
    best = optimum(block)
    solvers = {
        "ours": solve(block, 2),
        "greedy": solve(block, 2, "greedy"),
        "shortcut, every third": shortcut(block, 3),
        "shortcut, all": shortcut(block, 1),
    }
    ratios = {name: errors(block, scales) / best for name, scales in solvers.items()}
    return {
        "n": n,
        "channels": channels,
        "ratios": {name: [r.mean().item(), r.max().item()] for name, r in ratios.items()},
    }


def speed_table(rows: Iterable[Mapping[str, Any]]) -> str:
    header = ("solver", "bar", "verdict", "× faster", "ms", "plain ms", "np.sort ms", "error", "beside plain")
    cells = []
    for row in rows:
        faster = row["plain_ms"] / row["ms"]
        bar = row["bar"]
        verdict = ("", "") if bar is None else (f"≥ {bar:g}", "met" if faster >= bar else "missed")
        other = f"{row['other_ms']:.1f}" if "other_ms" in row else ""
        times = f"{faster:.1f}" if row["comparable"] else "", f"{row['ms']:.1f}", f"{row['plain_ms']:.1f}", other
        beside = row["error"] / row["plain_error"] - 1
        cells.append((row["variant"], *verdict, *times, f"{row['error']:.4f}", f"{beside:+.0e}"))
    return markdown_table(header, cells)


def channel_table(channels: Sequence[Mapping[str, Any]]) -> str:
    solvers = list(channels[0]["ratios"])
    rows = []
    for channel in channels:
        figures = (f"{mean:.4f} ({most:.2f})" for mean, most in channel["ratios"].values())
        rows.append((str(channel["n"]), str(channel["channels"]), *figures))
    return markdown_table(("elements", "channels", *solvers), rows)


def render(result: Mapping[str, Any]) -> str:
    facts = (
        "{device}, {threads} thread(s), torch {torch}, hf_r2 {hf_r2}, commit {commit}, {date}, {repetitions} rounds."
    )
    parts = [facts.format(**result)]
    for name, rows in result["shapes"].items():
        parts += [f"**{name}**", speed_table(rows)]
    return "\n\n".join([*parts, "**Error over the optimum: mean (largest)**", channel_table(result["channels"])])


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("least_squares-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--repetitions", type=int, default=9)
    parser.add_argument("--channels", type=int, default=1000, help="channels of each length to compare errors on")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--output", type=Path, help="default: results/least_squares-cpu-<threads>.json beside this file"
    )
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "least_squares.py")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    result = {**measuring.facts(options.threads), "repetitions": options.repetitions}
    result["shapes"] = {name: measure(0.03 * torch.randn(SHAPES[name]), options.repetitions) for name in options.shapes}
    result["channels"] = [compare_channels(n, options.channels) for n in CHANNELS]
    measuring.save(result, options.output or HERE / "results" / f"least_squares-cpu-{options.threads}.json")
    print(render(result))


if __name__ == "__main__":
    main()
