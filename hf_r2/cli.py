"""The console script `hf-r2`."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Compress Hugging Face models honestly.")

ModelPath = Annotated[str, typer.Argument(help="Directory or Hub name of a float checkpoint.")]


@contextmanager
def _clear_errors() -> Iterator[None]:
    """Show a user's mistake as one message and exit status 1, without a traceback."""
    try:
        yield
    except (ValueError, OSError) as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(1) from error


@app.command()
def inspect(
    model: ModelPath, as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False
) -> None:
    """Show the statistics of a model's weights.

    Example: hf-r2 inspect me/model
    """
    from hf_r2.quantization.quantizer import load_float_model
    from hf_r2.report.statistics import weight_statistics
    from hf_r2.report.tables import markdown_table

    with _clear_errors():
        statistics = weight_statistics(load_float_model(model))
    if as_json:
        typer.echo(json.dumps([asdict(weight) for weight in statistics]))
        return
    header = ("weight", "shape", "range", "crest factor", "kurtosis", "2-bit SQNR (dB)", "4-bit SQNR (dB)")
    rows = [
        (
            weight.name,
            "×".join(map(str, weight.shape)),
            f"{weight.range:.4g}",
            f"{weight.crest_factor:.2f}",
            f"{weight.kurtosis:.2f}",
            f"{weight.sqnr[2]:.1f}",
            f"{weight.sqnr[4]:.1f}",
        )
        for weight in statistics
    ]
    typer.echo(markdown_table(header, rows))


@app.command()
def quantize(
    model: ModelPath,
    output: Annotated[Path, typer.Argument(help="Directory of the compressed checkpoint.")],
    method: Annotated[str, typer.Option(help="Codec: uniform, palette or least_squares.")] = "uniform",
    bits: Annotated[int, typer.Option(help="Bits of a code, 1–8.")] = 4,
    grain: Annotated[str, typer.Option(help="'tensor', 'channel' or a group size.")] = "channel",
    cluster_dim: Annotated[int | None, typer.Option(help="palette: elements that share a code, 1–64.")] = None,
    basis: Annotated[str | None, typer.Option(help="least_squares: optimal, greedy or ternary.")] = None,
    range_: Annotated[str | None, typer.Option("--range", help="uniform: min_max, mse or percentile.")] = None,
    percentile: Annotated[float | None, typer.Option(help="--range percentile: percentage covered, 50–100.")] = None,
    refine: Annotated[
        list[str] | None, typer.Option(help="Step before compression: equalize or absorb_bias. May be repeated.")
    ] = None,
) -> None:
    """Compress a float checkpoint and write its model card.

    Example: hf-r2 quantize me/model model-4bit --method palette --bits 4
    """
    from hf_r2 import R2QuantizationConfig, R2Quantizer
    from hf_r2.report import render_card

    with _clear_errors():
        options = {"cluster_dim": cluster_dim, "basis": basis, "range": range_, "percentile": percentile}
        config = R2QuantizationConfig(method=method, bits=bits, grain=grain, refine=refine or (), **options)
        R2Quantizer.from_pretrained(model).quantize(output, config)
        render_card(output)
    typer.echo(f"{output} holds the compressed checkpoint and its card")


@app.command()
def card(directory: Annotated[Path, typer.Argument(help="Compressed checkpoint.")]) -> None:
    """Render the model card of a compressed checkpoint anew from its manifest.

    Example: hf-r2 card model-4bit
    """
    from hf_r2.report import render_card

    with _clear_errors():
        render_card(directory)
    typer.echo(f"wrote {directory / 'README.md'}")
