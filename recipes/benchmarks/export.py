"""How fast exported checkpoints run on this CPU beside PyTorch, and how large they are.

python recipes/benchmarks/export.py                    # needs the extras onnx and openvino; one thread
python recipes/benchmarks/export.py --render           # write the table of README.md from results/
python recipes/benchmarks/export.py --render --check   # exit 1 if README.md differs from what results/ say
"""

import argparse
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from benchmarks import measuring
from benchmarks.measuring import HERE
from torch import Tensor
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    PreTrainedModel,
    ResNetConfig,
    ResNetForImageClassification,
)

from hf_r2 import R2QuantizationConfig
from hf_r2.export import export
from hf_r2.export.program import ExampleInputs, traced
from hf_r2.quantization import compress
from hf_r2.report.tables import markdown_table

BEGIN, END = "<!-- export -->", "<!-- end of export -->"
CODECS = {
    "uniform, 8 bits": {"method": "uniform", "bits": 8},
    "uniform, 4 bits": {"method": "uniform", "bits": 4},
    "uniform, 2 bits": {"method": "uniform", "bits": 2},
    "palette, 4 bits": {"method": "palette", "bits": 4, "grain": "tensor"},
    "palette, 2 bits": {"method": "palette", "bits": 2, "grain": "tensor"},
}
SESSIONS = {
    "onnxruntime, decoded at load": {"session.disable_quant_qdq": "1"},
    "onnxruntime, as it is": {},
}
_RESNET18 = {"embedding_size": 64, "hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"}
_BERT = {"hidden_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 1024}

Run = Callable[[], Any]


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    if name == "resnet18":
        return ResNetForImageClassification(ResNetConfig(**_RESNET18, image_size=224, num_labels=1000)).eval()
    return BertForSequenceClassification(BertConfig(**_BERT, vocab_size=8192)).eval()


def make_inputs(name: str, batch: int) -> dict[str, Tensor]:
    """One image, or one text of 128 tokens, `batch` times."""
    if name == "resnet18":
        return {"pixel_values": torch.randn(1, 3, 224, 224).expand(batch, -1, -1, -1).contiguous()}
    ones = torch.ones(batch, 128, dtype=torch.int64)
    return {"input_ids": ones * 7, "attention_mask": ones, "token_type_ids": 0 * ones}


def onnx_session(path: Path, settings: Mapping[str, str], inputs: Mapping[str, Tensor]) -> Run:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    for key, value in settings.items():
        options.add_session_config_entry(key, value)
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    return lambda: session.run(None, arrays)[0]


def openvino_program(path: Path, inputs: Mapping[str, Tensor]) -> Run:
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 1}
    program = openvino.compile_model(path, "CPU", settings)
    arrays = {key: tensor.numpy() for key, tensor in inputs.items()}
    return lambda: program(arrays)["logits"]


def export_float(model: PreTrainedModel, name: str, path: Path) -> None:
    """Write the float model as plain ONNX."""
    inputs = make_inputs(name, 2)
    axes = {key: {0: "batch"} if tensor.dim() > 2 else {0: "batch", 1: "length"} for key, tensor in inputs.items()}
    program = traced(model, ExampleInputs(inputs, axes))
    torch.onnx.export(program, dynamo=True, input_names=list(inputs), output_names=["logits"]).save(path)


def directory_bytes(directory: Path, endings: Sequence[str]) -> int:
    return sum(path.stat().st_size for path in directory.iterdir() if path.suffix in endings)


@torch.no_grad()
def measure_model(name: str, codecs: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Time all exports of a model and PyTorch in turns; errors are those of logits beside hf_r2's own."""
    model, inputs = build(name), make_inputs(name, 1)
    expected: dict[str, Tensor] = {}
    runs: dict[tuple[str, str], Run] = {("float", "PyTorch"): lambda: model(**inputs).logits}
    sizes: dict[tuple[str, str], int] = {("float", "PyTorch"): sum(t.nbytes for t in model.state_dict().values())}
    with tempfile.TemporaryDirectory() as root:
        path = Path(root) / "float.onnx"
        export_float(model, name, path)
        expected["float"] = model(**inputs).logits
        runs["float", "onnxruntime"] = onnx_session(path, {}, inputs)
        sizes["float", "onnxruntime"] = path.stat().st_size
        for codec in codecs:
            directory = Path(root) / codec
            compressed = compress(build(name), R2QuantizationConfig(**CODECS[codec]))
            compressed.save_pretrained(directory / "hf_r2")
            expected[codec] = compressed(**inputs).logits
            for format in ("onnx", "openvino"):
                export(directory / "hf_r2", directory / format, format)
            for program, settings in SESSIONS.items():
                runs[codec, program] = onnx_session(directory / "onnx" / "model.onnx", settings, inputs)
                sizes[codec, program] = directory_bytes(directory / "onnx", (".onnx",))
            runs[codec, "openvino"] = openvino_program(directory / "openvino" / "openvino_model.xml", inputs)
            sizes[codec, "openvino"] = directory_bytes(directory / "openvino", (".xml", ".bin"))
        errors = {key: float((torch.as_tensor(run()) - expected[key[0]]).abs().max()) for key, run in runs.items()}
        times: dict[tuple[str, str], list[float]] = {key: [] for key in runs}
        for _ in range(rounds):
            for key, run in runs.items():
                run()  # the caches of the one before
                times[key].append(measuring.milliseconds(run, cuda=False))
    return [
        {"model": name, "weights": key[0], "program": key[1], "ms": median(times[key]), "bytes": sizes[key]}
        | {"error": errors[key]}
        for key in runs
    ]


def measure(models: Sequence[str], codecs: Sequence[str], rounds: int) -> dict[str, Any]:
    import onnxruntime
    import openvino

    torch.set_num_threads(1)
    versions = {"onnxruntime": onnxruntime.__version__, "openvino": openvino.__version__.partition("-")[0]}
    rows = [row for name in models for row in measure_model(name, codecs, rounds)]
    return {**measuring.facts(threads=1), **versions, "rounds": rounds, "rows": rows}


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    base = rows[0]
    header = ("weights", "program", "ms", "× PyTorch float", "file MB", "÷ float", "logits differ by")
    cells = [
        (
            row["weights"],
            row["program"],
            f"{row['ms']:.1f}",
            f"{row['ms'] / base['ms']:.2f}",
            f"{row['bytes'] / 1e6:.2f}",
            f"{base['bytes'] / row['bytes']:.1f}",
            f"{row['error']:.0e}",
        )
        for row in rows
    ]
    return markdown_table(header, cells)


def render(result: Mapping[str, Any]) -> str:
    facts = (
        "{device}, {threads} thread(s), torch {torch}, onnxruntime {onnxruntime}, openvino {openvino}, hf_r2 {hf_r2}, "
        "commit {commit}, {date}, {rounds} rounds."
    )
    models = dict.fromkeys(row["model"] for row in result["rows"])
    tables = [f"**{name}**\n\n{table(row for row in result['rows'] if row['model'] == name)}" for name in models]
    return "\n\n".join([facts.format(**result), *tables])


def render_readme(readme: str, results: Path) -> str:
    """Put all results between their markers."""
    rendered = "\n\n".join(map(render, measuring.read(sorted(results.glob("export-*.json")))))
    return measuring.between(readme, BEGIN, END, rendered)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=["resnet18", "bert"], default=["resnet18", "bert"])
    parser.add_argument("--codecs", nargs="+", choices=list(CODECS), default=list(CODECS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, help="default: results/export-cpu-1.json beside this file")
    parser.add_argument("--render", action="store_true")
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args(argv)
    if options.render:
        render_all = partial(render_readme, results=HERE / "results")
        return measuring.update_readme(render_all, options.check, "export.py")
    result = measure(options.models, options.codecs, options.rounds)
    measuring.save(result, options.output or HERE / "results" / "export-cpu-1.json")
    print(render(result))


if __name__ == "__main__":
    main()
