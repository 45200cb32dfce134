"""The console script `hf-r2`."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

if TYPE_CHECKING:
    from hf_r2.evaluation import LabelledData

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Compress Hugging Face models honestly.")

ModelPath = Annotated[str, typer.Argument(help="Directory or Hub name of a float checkpoint.")]
_DATA_HELP = (
    "'digits', 'python-bracket-depth', 'python-packages', a directory, or a data set on the Hub "
    "(name, or name:configuration)."
)
DataOption = Annotated[str | None, typer.Option(help=_DATA_HELP)]
SplitOption = Annotated[str, typer.Option(help="Split of the data.")]
InputOption = Annotated[
    list[str] | None,
    typer.Option("--input", help="Column of images (image) or texts (text); twice for pairs."),
]
LabelOption = Annotated[str, typer.Option(help="Column of class labels.")]
FloatOption = Annotated[str | None, typer.Option("--float", help="Float checkpoint to compare with.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Show a user's mistake as one message and exit status 1, without a traceback."""
    from huggingface_hub.errors import HTTPError

    try:
        yield
    except (ValueError, OSError, HTTPError, yaml.YAMLError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def inspect(
    model: Annotated[str, typer.Argument(help="Directory or Hub name of a float or compressed checkpoint.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    png: Annotated[Path | None, typer.Option(help="Also draw crest factors and SQNR to this file.")] = None,
) -> None:
    """Show the statistics of a model's weights, read from its files one by one.

    Example: hf-r2 inspect me/model
    """
    from hf_r2.report.inspection import inspect_checkpoint
    from hf_r2.report.plots import weight_profile
    from hf_r2.report.tables import markdown_table

    with _clear_errors():
        inspected = list(inspect_checkpoint(model))
        if png is not None:
            weight_profile([weight.statistics for weight in inspected], png)
    if as_json:
        typer.echo(json.dumps([{**asdict(w.statistics), "bits_per_weight": w.bits_per_weight} for w in inspected]))
        return
    header = ("weight", "shape", "bits", "range", "crest factor", "kurtosis", "2-bit SQNR (dB)", "4-bit SQNR (dB)")
    rows = [
        (
            weight.statistics.name,
            "×".join(map(str, weight.statistics.shape)),
            f"{weight.bits_per_weight:.4g}",
            f"{weight.statistics.range:.4g}",
            f"{weight.statistics.crest_factor:.2f}",
            f"{weight.statistics.kurtosis:.2f}",
            f"{weight.statistics.sqnr[2]:.1f}",
            f"{weight.statistics.sqnr[4]:.1f}",
        )
        for weight in inspected
    ]
    typer.echo(markdown_table(header, rows))


@app.command()
def report(
    checkpoints: Annotated[
        list[str], typer.Argument(help="One to three directories or Hub names of float or compressed checkpoints.")
    ],
    output: Annotated[Path, typer.Option(help="HTML file to write.")] = Path("report.html"),
    png: Annotated[Path | None, typer.Option(help="Also write the pictures as PNG into this folder.")] = None,
) -> None:
    """Show weights beside each other on one HTML page: histograms, crest factors, kurtosis, SQNR, training curves.

    Example: hf-r2 report baseline/float float compressed --output report.html
    """
    from hf_r2.report.page import write_report

    with _clear_errors():
        write_report(checkpoints, output, png)
    typer.echo(f"wrote {output}" + ("" if png is None else f" and the pictures in {png}"))


@app.command()
def quantize(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(help="Directory of the compressed checkpoint.")],
    method: Annotated[str | None, typer.Option(help="Codec: uniform (default), palette or least_squares.")] = None,
    bits: Annotated[int | None, typer.Option(help="Bits of a code, 1–8; 4 by default.")] = None,
    grain: Annotated[str | None, typer.Option(help="'tensor', 'channel' (default) or a group size.")] = None,
    cluster_dim: Annotated[int | None, typer.Option(help="palette: elements that share a code, 1–64.")] = None,
    basis: Annotated[str | None, typer.Option(help="least_squares: optimal, greedy or ternary.")] = None,
    range_: Annotated[str | None, typer.Option("--range", help="uniform: min_max, mse or percentile.")] = None,
    percentile: Annotated[float | None, typer.Option(help="--range percentile: percentage covered, 50–100.")] = None,
    refine: Annotated[list[str] | None, typer.Option(help="Post-training step. May be repeated.")] = None,
    config: Annotated[
        Path | None, typer.Option(help="YAML file with any keys of R2QuantizationConfig; options go before it.")
    ] = None,
    data: DataOption = None,
    split: SplitOption = "train",
    inputs: InputOption = None,
    examples: Annotated[int, typer.Option(help="Examples of the data, at most.")] = 1024,
) -> None:
    """Compress a float checkpoint and write its model card, tensor by tensor where no step needs the whole model.

    Steps that calibrate take their examples from --data. After an interruption the same command goes on.

    Example: hf-r2 quantize me/model model-4bit --method palette --bits 4

    Example: hf-r2 quantize me/model model-4bit --refine adaround --data digits
    """
    from hf_r2 import R2QuantizationConfig, R2Quantizer
    from hf_r2.evaluation.checkpoint import calibration_batches
    from hf_r2.quantization.stream import NotStreamable
    from hf_r2.report import render_card

    options = {"method": method, "bits": bits, "grain": grain, "cluster_dim": cluster_dim, "basis": basis}
    options |= {"range": range_, "percentile": percentile, "refine": refine}
    with _clear_errors():
        stated = {key: value for key, value in options.items() if value is not None}
        settings = R2QuantizationConfig(**{**_read_config(config), **stated})
        calibration = (
            None if data is None else calibration_batches(model, _labelled(model, data, split, inputs), examples)
        )
        quantizer = R2Quantizer.from_pretrained(model)
        try:
            quantizer.stream(output, settings)
        except NotStreamable:
            quantizer.quantize(output, settings, calibration)
        render_card(output)
    typer.echo(f"{output} holds the compressed checkpoint and its card")


@app.command()
def plan(
    model: ModelPath,
    output: Annotated[Path, typer.Option(help="YAML file for `quantize --config`; a picture goes beside it.")],
    target_size: Annotated[
        str | None, typer.Option(help="Size of the weight files, at most: 4MB, 500kB, 1.5GiB or bytes.")
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(help="Bits per compressed weight with codebooks, at most.")
    ] = None,
    min_recovery: Annotated[
        float | None, typer.Option(help="Least share of the float model's accuracy, measured on --data.")
    ] = None,
    method: Annotated[str, typer.Option(help="Codec: uniform, palette, least_squares, or any for each weight.")] = (
        "palette"
    ),
    grain: Annotated[str, typer.Option(help="'tensor', 'channel' or a group size.")] = "channel",
    include: Annotated[
        list[str] | None,
        typer.Option(help="Pattern of weights; '*' is all, with embeddings. May be repeated."),
    ] = None,
    skip: Annotated[
        list[str] | None, typer.Option(help="Pattern of weights that stay as they are. May be repeated.")
    ] = None,
    sensitivity: Annotated[
        str | None, typer.Option(help="sqnr (without data), fisher or kl (default with --data).")
    ] = None,
    data: DataOption = None,
    split: SplitOption = "validation",
    inputs: InputOption = None,
    label: LabelOption = "label",
    examples: Annotated[int, typer.Option(help="Examples of the data, at most.")] = 256,
) -> None:
    """Choose the bits of every weight for a size or a recovery, and write them as a config for `quantize`.

    With --data, losses are KL divergences from the float model. The plan is measured, and is the same bits for all
    weights unless another one is better by two standard errors: by cross-entropy, or without labels by divergence. Take
    examples that the model was not trained on, and others to report figures of: a split, or validation_from_train if
    that was held out.

    Example: hf-r2 plan me/model --target-size 4MB --output plan.yaml && hf-r2 quantize me/model out --config plan.yaml

    Example: hf-r2 plan me/model --min-recovery 0.99 --data me/images --split validation --output plan.yaml
    """
    from hf_r2.evaluation.checkpoint import calibration_batches
    from hf_r2.planning import plan_checkpoint
    from hf_r2.planning.output import draw_plan, parse_size, plan_table, summary, write_plan

    with _clear_errors():
        if output.suffix not in (".yaml", ".yml") or not output.parent.is_dir():
            raise ValueError(f"{output}: name a .yaml file in a folder that exists")
        batches = None
        if data is not None:
            batches = calibration_batches(model, _labelled(model, data, split, inputs, label), examples)
        found = plan_checkpoint(
            model,
            method,
            grain,
            target_bytes=None if target_size is None else parse_size(target_size),
            target_bits=target_bits,
            min_recovery=min_recovery,
            batches=batches,
            sensitivity=sensitivity,
            include=include,
            skip=skip,
        )
        picture = draw_plan(found, output.with_suffix(".png"))
        write_plan(found, output, f"hf-r2 quantize {model} <output> --config {output.name}")
    typer.echo("\n".join([plan_table(found), "", *summary(found), f"wrote {output} and {picture}"]))


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Directory or Hub name of a checkpoint, compressed or float.")],
    data: Annotated[str, typer.Option(help=_DATA_HELP)],
    split: SplitOption = "test",
    inputs: InputOption = None,
    label: LabelOption = "label",
    context: Annotated[int | None, typer.Option(help="Tokens of a sequence, for language models.")] = None,
    float_model: FloatOption = None,
    record: Annotated[bool, typer.Option("--record", help="Put the figures into manifest and card.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure a classifier of images or texts, or a language model; with --float also how close it is to that one.

    Example: hf-r2 evaluate model-4bit --data digits --float me/model --record

    Example: hf-r2 evaluate me/text-model --data me/reviews --split validation --input text
    """
    from hf_r2.evaluation import evaluate_checkpoint
    from hf_r2.report.results import record_figures, require_compressed

    with _clear_errors():
        if record:
            require_compressed(model)
        start = time.perf_counter()
        labelled = _labelled(model, data, split, inputs, label, context)
        figures = evaluate_checkpoint(model, labelled, float_model)
        if record:
            record_figures(model, labelled, figures, time.perf_counter() - start)
    typer.echo(json.dumps(figures) if as_json else "\n".join(f"{name:<15}{value}" for name, value in figures.items()))


@app.command()
def card(directory: Annotated[Path, typer.Argument(help="Compressed checkpoint.")]) -> None:
    """Render the model card of a compressed checkpoint anew from its manifest.

    Example: hf-r2 card model-4bit
    """
    from hf_r2.report import render_card

    with _clear_errors():
        render_card(directory)
    typer.echo(f"wrote {directory / 'README.md'}")


@app.command()
def dequantize(
    source: Annotated[str, typer.Argument(help="Directory or Hub name of a compressed checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory of the float checkpoint.")],
) -> None:
    """Write the decoded float weights as an ordinary checkpoint, which transformers loads without hf_r2.

    Example: hf-r2 dequantize me/model-4bit model-decoded
    """
    from hf_r2.quantization.float_copy import dequantize as write_float_copy

    with _clear_errors():
        write_float_copy(source, output)
    typer.echo(f"{output} holds the float checkpoint")


@app.command()
def export(
    source: Annotated[str, typer.Argument(help="Directory or Hub name of a compressed checkpoint.")],
    output: Annotated[Path, typer.Argument(help="Directory of the export.")],
    format_: Annotated[str, typer.Option("--format", help="onnx, openvino, coreml or compressed-tensors.")],
) -> None:
    r"""Write a compressed checkpoint in another format, its weights still low-bit codes.

    Each format is an extra: pip install "hf_r2\[onnx]".

    Example: hf-r2 export me/model-4bit model-onnx --format onnx
    """
    from hf_r2.export import export as export_checkpoint

    with _clear_errors():
        export_checkpoint(source, output, format_)
    typer.echo(f"{output} holds the export")


@app.command()
def push(
    directory: Annotated[Path, typer.Argument(help="Checkpoint with its card.")],
    repo_id: Annotated[str, typer.Argument(help="Repository, user/name; it is created if it is missing.")],
    private: Annotated[bool, typer.Option("--private", help="Push only to a private repository.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    float_revision: Annotated[
        str | None, typer.Option("--with-float-revision", help="Branch that gets the decoded float weights as well.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Publish a checkpoint on the Hub in one commit. The token is that of `hf auth login` or HF_TOKEN.

    Example: hf-r2 push model-4bit me/model-4bit --with-float-revision float
    """
    from hf_r2.hub import push as push_directory

    with _clear_errors():
        commit = push_directory(directory, repo_id, private=private, create_pr=create_pr, float_revision=float_revision)
    address = commit.pr_url or commit.commit_url
    typer.echo(json.dumps({"url": address, "commit": commit.oid}) if as_json else f"published: {address}")


@app.command()
def verify(
    source: Annotated[str, typer.Argument(help="user/name, user/name@revision or a directory.")],
    data: DataOption = None,
    float_model: FloatOption = None,
    as_json: JsonOption = False,
) -> None:
    """Check a compressed checkpoint: digests, sizes, and the figures of its card measured again.

    Exit status 0 only if every claim was checked and holds. --data and --float say where data and float model are, if
    they are not where the manifest says.

    Example: hf-r2 verify me/model-4bit@main
    """
    from hf_r2.hub import verify as verify_source
    from hf_r2.report.verification import FAIL, NOT_CHECKED, PASS

    with _clear_errors():
        checks = verify_source(source, data, float_model)
    if as_json:
        typer.echo(json.dumps([asdict(check) for check in checks]))
    else:
        for check in checks:
            values = "" if check.claimed is None else f"claimed {check.claimed:.6g}"
            values += "" if check.measured is None else f", measured {check.measured:.6g}"
            typer.echo(f"{check.result:<13}{check.figure:<17}{' '.join(filter(None, (values, check.note)))}")
        counts = {result: sum(check.result == result for check in checks) for result in (PASS, FAIL, NOT_CHECKED)}
        typer.echo(f"{counts[PASS]} hold, {counts[FAIL]} fail, {counts[NOT_CHECKED]} could not be checked")
    if any(check.result != PASS for check in checks):
        raise typer.Exit(1)


def _labelled(
    model: str,
    data: str,
    split: str,
    inputs: list[str] | None,
    label: str = "label",
    context: int | None = None,
) -> "LabelledData":
    """Name labelled data; columns have the usual names of the model's task by default."""
    from hf_r2.evaluation import LabelledData
    from hf_r2.evaluation.checkpoint import as_seen_by, task_of
    from hf_r2.evaluation.data import hub_revision

    name, _, config = data.partition(":") if not Path(data).exists() else (data, "", "")
    inputs = inputs or ["image" if task_of(model) == "image-classification" else "text"]
    labelled = LabelledData(name, split, tuple(inputs), label, config or None, hub_revision(name), context)
    return as_seen_by(model, labelled)


def _read_config(path: Path | None) -> dict[str, Any]:
    content = {} if path is None else yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict):
        raise ValueError(f"{path} is not a mapping of keys of R2QuantizationConfig to values")
    return content
