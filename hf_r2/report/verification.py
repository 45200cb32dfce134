"""Whether a compressed checkpoint is what its manifest and card say: digests, sizes, and figures measured again."""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCard
from huggingface_hub.errors import HTTPError
from transformers import AutoConfig, PreTrainedModel

from hf_r2.evaluation import LabelledData, evaluate_checkpoint
from hf_r2.files import weight_file_bytes
from hf_r2.quantization.skeleton import architecture_class
from hf_r2.report.card import CARD_NAME, average_bits, published_metrics, published_row
from hf_r2.report.manifest import Manifest

PASS, FAIL, NOT_CHECKED = "pass", "fail", "not checked"

_OWN = ("accuracy", "loss", "perplexity", "examples")
_RELATIVE = ("recovery", "agreement", "kl")
_SHARES = ("accuracy", "recovery", "agreement")
_UNREADABLE = (ValueError, RuntimeError, OSError, HTTPError)


@dataclass(frozen=True)
class Check:
    """One figure, or one other claim, and whether it holds.

    Args:
        figure: what is claimed.
        claimed: its value in the manifest; None for what is no number.
        measured: its value now; None if it was not measured.
        result: `"pass"`, `"fail"` or `"not checked"`.
        note: why it was not checked, or what is wrong.
    """

    figure: str
    claimed: float | None
    measured: float | None
    result: str
    note: str = ""


def verify_checkpoint(
    directory: str | os.PathLike[str],
    data: str | None = None,
    float_source: str | os.PathLike[str] | None = None,
) -> list[Check]:
    """Check a directory with a compressed checkpoint against its manifest and card.

    Weights are compared with their SHA-256, sizes are taken again, and the published figures are measured again on the
    data that the manifest names. Another machine rounds otherwise, so shares (accuracy, recovery, agreement) pass
    within 0.001 or one and a half examples, and losses in nats and perplexities within 1 %.

    Args:
        directory: checkpoint with its manifest.
        data: where the evaluation data are, if not where the manifest says.
        float_source: the float model, for figures that compare with it; the base model on the Hub without.

    Returns:
        One check a claim. What could not be measured is among them, as not checked, with the reason.

    Raises:
        ValueError: if there is no whole manifest of a compressed checkpoint.
    """
    try:
        return _all_checks(directory, Manifest.load(directory), data, float_source)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the manifest of {directory} is incomplete or was changed by hand ({error!r})") from error


def _all_checks(
    directory: str | os.PathLike[str],
    manifest: Manifest,
    data: str | None,
    float_source: str | os.PathLike[str] | None,
) -> list[Check]:
    quantize, evaluate = manifest.last("quantize"), manifest.last("evaluate")
    if not quantize:
        raise ValueError(
            f"{directory} has no manifest of a compressed checkpoint (manifest.json): there is nothing to check it by"
        )
    published = published_row(evaluate)
    weights = list(_check_weights(directory, quantize))
    checks = [_check_card(Path(directory), published), *weights]
    if not published:
        return checks
    claims = {name: published[name] for name in (*_OWN, *_RELATIVE) if published.get(name) is not None}
    if any(check.result == FAIL for check in weights):
        return [*checks, *_unchecked(claims, "the checkpoint is not the one that was measured")]
    return [*checks, *_check_figures(directory, claims, evaluate["data"], data, float_source or quantize["base_model"])]


def _check_card(directory: Path, published: Mapping[str, Any]) -> Check:
    """Compare the metrics in the card's metadata with the manifest's."""
    claimed = published.get("accuracy")
    try:
        results = ModelCard.load(directory / CARD_NAME).data.eval_results or []
    except _UNREADABLE as error:
        return Check("card", claimed, None, FAIL, f"it cannot be read: {error}")
    values = [result.metric_value for result in results]
    if values != [published[metric] for metric in published_metrics(published)]:
        return Check("card", claimed, values[0] if values else None, FAIL, "it differs from the manifest")
    return Check("card", claimed, claimed, PASS)


def _check_weights(directory: str | os.PathLike[str], quantize: Mapping[str, Any]) -> Iterator[Check]:
    """Check the digests by loading, and the sizes."""
    recorded = quantize["quantization_config"].get("sha256")
    try:
        model = _load_as_saved(os.fspath(directory), recorded)
    except _UNREADABLE as error:
        yield Check("SHA-256", None, None, FAIL, str(error))
        return
    if recorded is None:
        yield Check("SHA-256", None, None, NOT_CHECKED, "the manifest holds no digests")
    else:
        yield Check("SHA-256", None, None, PASS)
    size = weight_file_bytes(directory)
    yield _compare("bytes", quantize["bytes"]["compressed"], size, 0)
    facts = {weight["name"]: weight["bits_per_weight"] for weight in quantize["weights"]}
    encoded = {name: weight.bits_per_weight for name, weight in model.hf_quantizer.encoded.items()}
    if facts.keys() != encoded.keys():
        yield Check("bits per weight", None, None, FAIL, "other weights are compressed than the manifest says")
    else:
        claimed, measured = (average_bits(bits, quantize["weights"]) for bits in (facts, encoded))
        yield _compare("bits per weight", claimed, measured, 1e-6)


def _load_as_saved(directory: str, recorded: Mapping[str, Any] | None) -> PreTrainedModel:
    """Load a compressed checkpoint, which compares its tensors with the digests in config.json, the manifest's.

    Raises:
        ValueError: if a digest differs, or the checkpoint is not compressed.
    """
    config = AutoConfig.from_pretrained(directory)
    there = (getattr(config, "quantization_config", None) or {}).get("sha256")
    if there is None or (recorded is not None and there != recorded):
        raise ValueError("config.json has other digests than the manifest")
    # In another dtype, which config.json may ask for, the uncompressed tensors would not be compared
    floats = [name for name in there.get("rest_dtypes", []) if getattr(torch, name).is_floating_point]
    options = {"dtype": getattr(torch, floats[0])} if len(floats) == 1 else {}
    return architecture_class(config, directory).from_pretrained(directory, **options)


def _check_figures(
    directory: str | os.PathLike[str],
    claims: Mapping[str, float],
    facts: Mapping[str, Any],
    data: str | None,
    float_source: str | os.PathLike[str],
) -> Iterator[Check]:
    """Measure the published figures again: first with the float model, if any of them compares with it."""
    relative = {name: value for name, value in claims.items() if name in _RELATIVE}
    reachable, reason = None, ""
    if relative:
        reachable, reason = _reach(float_source)
    try:
        figures = evaluate_checkpoint(directory, LabelledData.from_facts(facts, data), reachable)
    except _UNREADABLE as error:
        yield from _unchecked(claims, str(error))
        return
    for name, claimed in claims.items():
        if name in figures:
            yield _compare(name, claimed, figures[name], _tolerance(name, claimed, figures["examples"]))
    if reachable is None:
        yield from _unchecked(relative, reason)


def _reach(float_source: str | os.PathLike[str]) -> tuple[str | None, str]:
    """Return the float model's name if it can be loaded, else why it cannot."""
    source = os.fspath(float_source)
    try:
        AutoConfig.from_pretrained(source)
    except _UNREADABLE:
        return None, f"the float model {source!r} is neither here nor on the Hub: say where it is with --float"
    return source, ""


def _tolerance(name: str, claimed: float, examples: int) -> float:
    if name in _SHARES:
        return max(1e-3, 1.5 / examples)
    return 0 if name == "examples" else 0.01 * claimed + 1e-4


def _compare(figure: str, claimed: float, measured: float, tolerance: float) -> Check:
    holds = measured is not None and abs(measured - claimed) <= tolerance
    return Check(figure, claimed, measured, PASS if holds else FAIL)


def _unchecked(claims: Mapping[str, float], reason: str) -> list[Check]:
    return [Check(name, claimed, None, NOT_CHECKED, reason) for name, claimed in claims.items()]
