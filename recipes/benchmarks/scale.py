"""What it takes to compress, inspect and reload large models: seconds of processor time and peak memory.

python recipes/benchmarks/scale.py                    # measure on the CPU; writes 4 GB under --directory
python recipes/benchmarks/scale.py --size small       # the same on a small model, to see that it runs
python recipes/benchmarks/scale.py --render           # write the tables of README.md from results/
python recipes/benchmarks/scale.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import measuring
from benchmarks.measuring import HERE
from transformers import BertConfig, BertForMaskedLM, PreTrainedModel, Qwen2Config, Qwen2ForCausalLM

import hf_r2
from hf_r2 import R2QuantizationConfig, R2Quantizer
from hf_r2.files import atomic_write, weight_file_bytes
from hf_r2.quantization.stream import RECORD
from hf_r2.quantization.tensor_files import TensorWriter, stored_tensors
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- scale -->", "<!-- end of scale -->"
BARS = {"compress": 1500, "inspect": 600}  # MB
SIZES = {
    "1.5 B": {
        "causal": {
            "hidden_size": 1536,
            "num_hidden_layers": 28,
            "num_attention_heads": 12,
            "num_key_value_heads": 2,
            "intermediate_size": 8960,
            "vocab_size": 151936,
        },
        "bert": {},
        "shard_bytes": 500_000_000,
    },
    "small": {
        "causal": {
            "hidden_size": 64,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 256,
            "vocab_size": 1000,
        },
        "bert": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128},
        "shard_bytes": 200_000,
    },
}
CONFIG = {"method": "palette", "bits": 4, "grain": "tensor", "include": ["*"]}
RELOADED = {"method": "palette", "bits": 2, "grain": "tensor"}
MODES = ("float", "decoded", "packed")


def make_checkpoint(config: Qwen2Config, directory: Path, shard_bytes: int) -> int:
    """Write random bfloat16 weights of a model, shard by shard, and return their number."""
    directory.mkdir(parents=True)
    with torch.device("meta"):
        model = Qwen2ForCausalLM(config)
    tensors = {n: t for n, t in model.state_dict().items() if n not in model.all_tied_weights_keys}
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, tensor in tensors.items():
        if shards[-1] and 2 * sum(t.numel() for t in [*shards[-1].values(), tensor]) > shard_bytes:
            shards.append({})
        shards[-1][name] = tensor
    names = {}
    generator = torch.Generator().manual_seed(0)
    for index, shard in enumerate(shards, start=1):
        file = f"model-{index:05}-of-{len(shards):05}.safetensors"
        with TensorWriter(directory / file, {n: ("BF16", tuple(t.shape)) for n, t in shard.items()}) as writer:
            for name, tensor in shard.items():
                values = torch.empty(tensor.shape, dtype=torch.bfloat16)
                writer.write(name, values.normal_(0, 0.02, generator=generator))
                names[name] = file
    config.dtype, config.architectures = "bfloat16", ["Qwen2ForCausalLM"]
    config.save_pretrained(directory)
    atomic_write(directory / "model.safetensors.index.json", json.dumps({"metadata": {}, "weight_map": names}))
    return sum(tensor.numel() for tensor in tensors.values())


def read_once(directory: Path) -> None:
    """Read all shards of a checkpoint, as its compression must."""
    for path in sorted(directory.glob("*.safetensors")):
        with open(path, "rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def compress(source: Path, target: Path, workers: int) -> None:
    R2Quantizer.from_pretrained(source).stream(target, R2QuantizationConfig(**CONFIG), workers)


def inspect(source: Path) -> None:
    from hf_r2.cli import app

    app(["inspect", str(source), "--json"])


def status(key: str) -> int:
    """Read a size in bytes from the process's status."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def reload(directory: Path, mode: str) -> None:
    """Load a checkpoint and run it; print processor seconds, and memory beyond what the process had before, as JSON."""
    batch = torch.arange(64)[None]
    before = status("VmRSS")
    start = time.process_time()
    if mode == "packed":
        with hf_r2.keep_packed():
            model: PreTrainedModel = BertForMaskedLM.from_pretrained(directory)
    else:
        model = BertForMaskedLM.from_pretrained(directory)
    load = time.process_time() - start
    with torch.no_grad():
        model(batch)  # float weights are mapped, and come into memory only now
        start = time.process_time()
        model(batch)
    forward = time.process_time() - start
    peak, held = status("VmHWM") - before, status("VmRSS") - before
    print(json.dumps({"load_s": load, "peak_bytes": peak, "held_bytes": held, "forward_s": forward}))


def start(command: str, *arguments: object, threads: int = 1, output: int | None = subprocess.DEVNULL) -> Any:
    """Start one of this program's steps in a process of its own."""
    line = [sys.executable, __file__, "--step", command, *map(str, arguments)]
    return subprocess.Popen(line, stdout=output, env={**os.environ, "OMP_NUM_THREADS": str(threads)}, text=True)


def finish(process: Any) -> dict[str, float]:
    """Wait for a step; return its processor seconds and its largest resident memory, of the whole process."""
    _, code, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(code)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"a step failed: {process.args}")
    return {"cpu_s": usage.ru_utime + usage.ru_stime, "peak_bytes": 1024 * usage.ru_maxrss}


def measured(command: str, *arguments: object, threads: int = 1) -> dict[str, float]:
    begin = time.perf_counter()
    return {**finish(start(command, *arguments, threads=threads)), "wall_s": time.perf_counter() - begin}


def finished_shards(target: Path) -> list[str]:
    record = target.with_name(f".{target.name}.unfinished") / RECORD
    return sorted(json.loads(record.read_text())["shards"]) if record.is_file() else []


def compress_through_a_kill(source: Path, target: Path, threads: int) -> dict[str, Any]:
    """Kill the compression once it has two shards, resume it, and measure both runs."""
    process = start("compress", source, target, threads, threads=threads)
    running = os.WEXITED | os.WNOHANG | os.WNOWAIT
    while len(finished_shards(target)) < 2 and os.waitid(os.P_PID, process.pid, running) is None:
        time.sleep(0.02)
    process.kill()
    killed, kept = finish(process), finished_shards(target)
    resumed = measured("compress", source, target, threads, threads=threads)
    return {"killed": killed, "kept_shards": len(kept), "resumed": resumed}


def measure_causal(directory: Path, size: str, threads: int) -> dict[str, Any]:
    """Make the large checkpoint, read it, compress it and inspect it, each in a process of its own."""
    source, target = directory / "float", directory / "packed"
    # Not in this process: a step's largest memory is never below that of the process which starts it
    measured("make", size, source)
    return {
        "weights": sum(t.nbytes // 2 for f in source.glob("*.safetensors") for t in stored_tensors(f).values()),
        "float_bytes": weight_file_bytes(source),
        "shards": len(list(source.glob("*.safetensors"))),
        "idle": measured("idle"),
        "read": measured("read_once", source),
        "compress": compress_through_a_kill(source, target, threads),
        "packed_bytes": weight_file_bytes(target),
        "inspect": measured("inspect", source),
    }


def measure_reload(directory: Path, size: Mapping[str, Any]) -> dict[str, Any]:
    """Load a 2-bit BERT and its float32 checkpoint, each in a process of its own."""
    torch.manual_seed(0)
    BertForMaskedLM(BertConfig(**size["bert"])).save_pretrained(directory / "bert")
    R2Quantizer.from_pretrained(directory / "bert").stream(directory / "bert-2bit", R2QuantizationConfig(**RELOADED))
    rows = {}
    for mode in MODES:
        path = directory / ("bert" if mode == "float" else "bert-2bit")
        process = start("reload", path, mode, output=subprocess.PIPE)
        output, _ = process.communicate()
        rows[mode] = {"file_bytes": weight_file_bytes(path), **json.loads(output.splitlines()[-1])}
    return rows


def causal_table(result: Mapping[str, Any]) -> str:
    """One row for each step; a kill and its resumption count together."""
    runs, idle = result["compress"], result["idle"]["cpu_s"]
    both = {
        "cpu_s": runs["killed"]["cpu_s"] + runs["resumed"]["cpu_s"] - idle,
        "peak_bytes": max(runs["killed"]["peak_bytes"], runs["resumed"]["peak_bytes"]),
    }
    steps = [
        ("import hf_r2", result["idle"], None),
        ("one read of the files", result["read"], None),
        (f"compress, killed once ({runs['kept_shards']} of {result['shards']} shards kept)", both, BARS["compress"]),
        ("hf-r2 inspect", result["inspect"], BARS["inspect"]),
    ]
    rows = []
    for name, row, bar in steps:
        seconds = max(row["cpu_s"] - (idle if row is not result["idle"] else 0), 1e-9)
        megabytes = row["peak_bytes"] / 1e6
        verdict = "" if bar is None else "met" if megabytes <= bar else "missed"
        rate = "" if name == steps[0][0] else f"{result['weights'] / seconds / 1e6:,.1f}"
        rows.append((name, "" if bar is None else f"≤ {bar} MB", verdict, f"{megabytes:,.0f}", f"{seconds:.1f}", rate))
    return markdown_table(("step", "bar", "verdict", "peak MB", "CPU s", "M weights / CPU s"), rows)


def reload_table(rows: Mapping[str, Mapping[str, float]]) -> str:
    """One row for each way to hold the weights, as ratios to the float checkpoint."""
    base = rows["float"]
    keys = ("file_bytes", "load_s", "peak_bytes", "held_bytes", "forward_s")
    cells = []
    for mode, row in rows.items():
        ratios = [f"{row[key] / max(base[key], 1e-9):.2f}" for key in keys]
        cells.append((mode, f"{row['file_bytes'] / 1e6:.1f} MB", f"{row['load_s']:.2f} s", *ratios))
    header = ("weights", "file", "load", "file ratio", "load ratio", "peak ratio", "held ratio", "forward ratio")
    return markdown_table(header, cells)


def render(result: Mapping[str, Any]) -> str:
    facts = "{device}, {threads} thread(s), torch {torch}, hf_r2 {hf_r2}, commit {commit}, {date}."
    causal = result["causal"]
    title = (
        f"**{causal['weights'] / 1e9:.2f} billion weights**: {causal['float_bytes'] / 1e6:,.0f} MB in bfloat16, "
        f"{causal['packed_bytes'] / 1e6:,.0f} MB packed."
    )
    parts = (facts.format(**result), title, causal_table(causal), "**2-bit BERT**", reload_table(result["reload"]))
    return "\n\n".join(parts)


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("scale-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def step(command: str, arguments: Sequence[str]) -> None:
    """Do one step, in the process that was started for it."""
    if command == "make":
        size = SIZES[arguments[0]]
        config = Qwen2Config(**size["causal"], tie_word_embeddings=True)
        make_checkpoint(config, Path(arguments[1]), size["shard_bytes"])
    elif command == "read_once":
        read_once(Path(arguments[0]))
    elif command == "compress":
        compress(Path(arguments[0]), Path(arguments[1]), int(arguments[2]))
    elif command == "inspect":
        inspect(Path(arguments[0]))
    elif command == "reload":
        reload(Path(arguments[0]), arguments[1])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="1.5 B")
    parser.add_argument("--threads", type=int, default=2, help="of the compression; all else has one")
    parser.add_argument("--directory", type=Path, help="where the checkpoints go for a while; default: the system's")
    parser.add_argument("--output", type=Path, help="default: results/scale-cpu-<threads>.json beside this file")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.step:
        return step(options.step[0], options.step[1:])
    if options.render:
        return measuring.update_readme(partial(render_readme, results=HERE / "results"), options.check, "scale.py")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        result = {
            **measuring.facts(options.threads),
            "causal": measure_causal(Path(directory), options.size, options.threads),
            "reload": measure_reload(Path(directory), SIZES[options.size]),
        }
    measuring.save(result, options.output or HERE / "results" / f"scale-cpu-{options.threads}.json")
    print(render(result))


if __name__ == "__main__":
    main()
