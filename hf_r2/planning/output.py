"""A plan on paper: the YAML that `quantize` reads, the table of its weights, a few lines, and the picture."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from hf_r2.files import atomic_write
from hf_r2.planning.calibration import STANDARD_ERRORS
from hf_r2.planning.plan import Plan
from hf_r2.planning.search import Point
from hf_r2.report.plots import SizedLoss, size_against_loss
from hf_r2.report.tables import markdown_table

LOSS_UNITS = {
    "sqnr": "relative noise Σ(W−Ŵ)²/ΣW², summed over weights",
    "fisher": "½ Σ F (W−Ŵ)² (nats)",
    "kl": "KL divergence (nats)",
}
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 2**10, "MI": 2**20, "GI": 2**30}


def parse_size(text: str) -> int:
    """Read a number of bytes such as `4MB`, `1.5 GiB` or `48000`; kB, MB and GB are powers of 1000.

    Raises:
        ValueError: for anything else.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*)\s*([KMG]I?|)B?\s*", text.upper())
    if found is None:
        raise ValueError(f"{text!r} is not a size: write 4MB, 500kB, 1.5GiB or a number of bytes")
    return int(float(found[1]) * _UNITS[found[2]])


def write_plan(plan: Plan, path: str | os.PathLike[str], origin: str) -> Path:
    """Write a plan's config as YAML, with its figures in comments.

    Args:
        plan: the plan.
        path: the file.
        origin: what it was made of, for the first line.

    Returns:
        The path.
    """
    content = plan.config.to_dict()
    kept = {key: content[key] for key in ("method", "bits", "grain", "include", "skip", "min_numel") if key in content}
    if "overrides" in content:
        kept["overrides"] = dict(content["overrides"])
    comments = "".join(f"# {line}\n" for line in (origin, *summary(plan)))
    atomic_write(path, comments + yaml.safe_dump(kept, sort_keys=False, allow_unicode=True, width=120))
    return Path(path)


def summary(plan: Plan) -> list[str]:
    """Say in a few lines what a plan takes and loses, and how far the allocation may be from the best one."""
    numel = sum(math.prod(weight.shape) for weight in plan.weights.values())
    bits = 8 * sum(weight.nbytes for weight in plan.weights.values()) / numel
    lines = [f"weight files: {plan.point.file_bytes:,} bytes; {bits:.3f} bits per compressed weight with codebooks"]
    if plan.allocated is not None:
        lines.append(
            f"allocation by {plan.sensitivity}: {_losses(plan.allocated)}, optimality gap {plan.gap:.2%} of that"
        )
    lines.append(f"plan: {_losses(plan.point)}")
    if plan.best_uniform is not None:
        size = f"{plan.best_uniform.file_bytes:,} bytes"
        lines.append(f"best uniform settings: {label(plan.best_uniform)}, {size}, {_losses(plan.best_uniform)}")
        if plan.point.measured is not None and plan.point.settings == plan.best_uniform.settings:
            lines.append(
                f"they are the plan: on these examples nothing else was better by {STANDARD_ERRORS} standard errors"
            )
    return lines


def plan_table(plan: Plan) -> str:
    """Lay out the weights of a plan as a table."""
    header = ("weight", "shape", "codec", "bits", "bytes", "bits per weight", "predicted loss")
    rows = [
        (
            name,
            "×".join(map(str, weight.shape)),
            weight.settings.method,
            str(weight.settings.bits),
            f"{weight.nbytes:,}",
            f"{8 * weight.nbytes / math.prod(weight.shape):.3f}",
            f"{weight.loss:.3g}",
        )
        for name, weight in plan.weights.items()
    ]
    return markdown_table(header, rows)


def draw_plan(plan: Plan, path: str | os.PathLike[str]) -> Path:
    """Draw the plan among the Pareto front and the uniform points: size against predicted and measured loss."""
    return size_against_loss(
        _sized(plan.front),
        {label(point): _sized([point])[0] for point in plan.uniform},
        _sized([plan.point])[0],
        path,
        LOSS_UNITS[plan.sensitivity],
    )


def label(point: Point) -> str:
    """Name uniform settings."""
    largest = max(point.settings.values(), key=lambda settings: settings.bits)
    return f"{largest.method} {largest.bits}-bit"


def _sized(points: Sequence[Point]) -> list[SizedLoss]:
    return [SizedLoss(p.file_bytes, p.predicted, None if p.measured is None else p.measured.kl) for p in points]


def _losses(point: Point) -> str:
    text = f"predicted loss {point.predicted:.4g}"
    if point.measured is not None:
        text += f", measured KL {point.measured.kl:.4g} nats"
        entropy = point.measured.cross_entropy
        text += "" if entropy is None else f", cross-entropy {entropy:.4g} nats"
        text += "" if point.measured.recovery is None else f", recovery {point.measured.recovery:.2%}"
    return text
