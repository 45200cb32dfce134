"""What post-training steps cost on the small ResNet of the digits recipes: time, and memory beside one layer's data.

python recipes/benchmarks/refine.py                    # measure on the CPU, each step in a process of its own
python recipes/benchmarks/refine.py --render           # write the table of README.md from results/
python recipes/benchmarks/refine.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import multiprocessing
import resource
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import measuring
from benchmarks.measuring import HERE
from torch import Tensor, nn
from transformers import ResNetConfig, ResNetForImageClassification

from hf_r2 import R2QuantizationConfig, R2Quantizer, select_weights
from hf_r2.refine import REFINEMENTS
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- refine -->", "<!-- end of refine -->"
BATCH = 64
BARS = {"adaround": 120}  # seconds, for 512 images on two cores


def build() -> ResNetForImageClassification:
    torch.manual_seed(0)
    sizes = {"embedding_size": 16, "hidden_sizes": [16, 32, 64], "depths": [1, 1, 1], "layer_type": "basic"}
    return ResNetForImageClassification(ResNetConfig(**sizes, num_labels=10)).eval()


def make_images(count: int) -> list[dict[str, Tensor]]:
    images = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    return [{"pixel_values": batch} for batch in images.split(BATCH)]


@torch.no_grad()
def largest_layer_bytes(model: nn.Module, images: int) -> int:
    """Bytes of the inputs and outputs of the layer that has most of them, over all images."""
    found: list[int] = []

    def note(layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        found.append(images * (inputs[0].nbytes + output.nbytes))

    handles = [layer.register_forward_hook(note) for layer, _ in select_weights(model).values()]
    model(pixel_values=torch.zeros(1, 3, 32, 32))
    for handle in handles:
        handle.remove()
    return max(found)


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure_step(step: str, images: int, threads: int, directory: str) -> dict[str, Any]:
    """Compress to 4 bits with one step; a small run before has libraries loaded and buffers grown."""
    torch.set_num_threads(threads)
    config = R2QuantizationConfig("uniform", bits=4, grain="tensor", refine=[] if step == "none" else [step])
    quantizer = R2Quantizer.from_pretrained(f"{directory}/float")
    batches = make_images(images)
    quantizer.quantize(f"{directory}/{step}", R2QuantizationConfig("uniform", bits=4, grain="tensor"), batches[:1])
    before, start = peak_bytes(), time.perf_counter()
    quantizer.quantize(f"{directory}/{step}", config, batches)
    return {"step": step, "seconds": time.perf_counter() - start, "bytes": peak_bytes() - before}


def measure(steps: Sequence[str], images: int, threads: int) -> dict[str, Any]:
    model = build()
    result = {**measuring.facts(threads), "images": images, "layer_bytes": largest_layer_bytes(model, images)}
    with tempfile.TemporaryDirectory() as directory:
        model.save_pretrained(f"{directory}/float")
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            rows = [pool.apply(measure_step, (step, images, threads, directory)) for step in steps]
    return {**result, "rows": [{**row, "bar": BARS.get(row["step"])} for row in rows]}


def table(rows: Iterable[Mapping[str, Any]], layer_bytes: int) -> str:
    cells = []
    for row in rows:
        bar = row["bar"]
        verdict = ("", "") if bar is None else (f"≤ {bar:g} s", "met" if row["seconds"] <= bar else "missed")
        cells.append((row["step"], *verdict, f"{row['seconds']:.1f}", f"{row['bytes'] / layer_bytes:.2f}"))
    return markdown_table(("step", "bar", "verdict", "seconds", "memory in one layer's data"), cells)


def render(result: Mapping[str, Any]) -> str:
    facts = (
        "{device}, {threads} thread(s), torch {torch}, hf_r2 {hf_r2}, commit {commit}, {date}, {images} images. "
        "Inputs and outputs of the largest layer: {megabytes:.0f} MB."
    )
    intro = facts.format(**result, megabytes=result["layer_bytes"] / 1e6)
    return f"{intro}\n\n{table(result['rows'], result['layer_bytes'])}"


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("refine-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", nargs="+", choices=["none", *REFINEMENTS], default=["none", *REFINEMENTS])
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="default: results/refine-cpu-<threads>.json beside this file")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "refine.py")
    result = measure(options.steps, options.images, options.threads)
    measuring.save(result, options.output or HERE / "results" / f"refine-cpu-{options.threads}.json")
    print(render(result))


if __name__ == "__main__":
    main()
