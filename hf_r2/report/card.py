"""The model card: a rendering of the manifest."""

import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, EvalResultEntry, ModelCard, ModelCardData, eval_result_entries_to_yaml

from hf_r2.aware import ActivationSettings
from hf_r2.files import atomic_write
from hf_r2.report.manifest import Manifest
from hf_r2.report.tables import markdown_table, result_table

TEMPLATE = Path(__file__).with_name("card.md.jinja")
CARD_NAME = "README.md"
RESULTS_FOLDER = ".eval_results"

METHOD_SENTENCES = {
    "uniform": "uniform quantization, whose levels are equally spaced",
    "palette": "palettes: look-up tables found by optimal one-dimensional k-means",
    "least_squares": "least-squares binary quantization, whose levels are signed sums of scales, one for each bit",
}
VECTOR_SENTENCE = (
    "palettes of vectors: look-up tables found by k-means, whose {bits}-bit codes each name {cluster_dim} weights"
)
AWARE_SENTENCES = {
    "dkm": "palettes: look-up tables trained together with the weights by differentiable k-means (DKM)",
    "least_squares": "least-squares binary quantization, which the weights were trained through, and whose levels are "
    "signed sums of scales, one for each bit",
    "lsq": "uniform quantization whose step was learned with the weights (LSQ)",
    "ewgs": "uniform quantization whose range and scale were learned with the weights, by element-wise scaled "
    "gradients (EWGS)",
    "dorefa": "uniform quantization of the tanh of the weights, which were trained through it (DoReFa)",
    "pact": "uniform quantization of the tanh of the weights, which were trained through it, as PACT does (DoReFa)",
}
INPUT_SENTENCES = {
    "uniform": "uniform levels over {range} ranges",
    "lsq": "uniform levels of learned step (LSQ)",
    "pact": "uniform levels up to a learned clip (PACT)",
    "dorefa": "uniform levels in [0, 1] (DoReFa)",
    "ewgs": "uniform levels between learned bounds (EWGS)",
}
REFINEMENT_SENTENCES = {
    "equalize": "cross-layer equalization with folded batch norms",
    "absorb_bias": "absorption of high biases",
    "adaround": "adaptive rounding (AdaRound)",
    "compensate": "error-compensated rounding",
    "bias_correction": "bias correction",
    "batch_norm": "re-estimation of batch norms",
}
SOURCES = {
    "lsq": "LSQ: Esser et al., [arXiv 1902.08153](https://arxiv.org/abs/1902.08153)",
    "ewgs": "EWGS: Lee et al., [arXiv 2104.00903](https://arxiv.org/abs/2104.00903)",
    "dorefa": "DoReFa: Zhou et al., [arXiv 1606.06160](https://arxiv.org/abs/1606.06160)",
    "pact": "PACT: Choi et al., [arXiv 1805.06085](https://arxiv.org/abs/1805.06085)",
}
"""Papers of methods that weights or inputs are quantized by."""

LOSS_SENTENCES = {
    "l_inf": "the largest magnitude of each group",
    "margin": "a learnable margin of each group and what stands outside it",
    "soft_min_max": "a smooth measure of the range of each group",
    "tail": "the mean of the largest magnitudes of each group",
    "kurtosis": "the distance of each group's kurtosis from a uniform distribution's",
}


RESTRICTION_SENTENCES = {
    "loss": "adds {loss} to the task loss (`{r2_loss}`, {strength}, grain {r2_grain})",
    "prox": "takes a proximal step of each group's largest magnitude after every optimizer step "
    "({strength}, grain {r2_grain})",
    "clip": "clips each group at {r2_clip} times its rms after every optimizer step (grain {r2_grain})",
}


def render_card(directory: str | os.PathLike[str]) -> ModelCard:
    """Render the card of a compressed checkpoint from its manifest and write it as README.md.

    Nothing is typed: what the manifest does not hold has no line. Results on a data set of the Hub are also written
    to `.eval_results/`, from where the Hub shows them with the data set.

    Raises:
        ValueError: if the directory has no manifest with a quantize stage.
    """
    directory = Path(directory)
    manifest = Manifest.load(directory)
    if not manifest.last("quantize"):
        raise ValueError(f"{directory} has no manifest of a compressed checkpoint: make it with R2Quantizer.quantize")
    card = build_card(manifest)
    card.save(directory / CARD_NAME)
    entries = eval_result_entries(manifest)
    shutil.rmtree(directory / RESULTS_FOLDER, ignore_errors=True)
    if entries:
        (directory / RESULTS_FOLDER).mkdir()
        text = yaml.safe_dump(eval_result_entries_to_yaml(entries), sort_keys=False)
        name = entries[0].dataset_id.replace("/", "--")
        atomic_write(directory / RESULTS_FOLDER / f"{name}.yaml", text)
    return card


def eval_result_entries(manifest: Manifest) -> list[EvalResultEntry]:
    """List the published results on data sets of the Hub, in the form that it shows them with the data set."""
    evaluate = manifest.last("evaluate")
    published, data = published_row(evaluate), evaluate.get("data") or {}
    if not published or not data.get("hub_name"):
        return []
    return [
        EvalResultEntry(
            dataset_id=data["hub_name"],
            task_id=data.get("config") or "default",
            value=published["accuracy"],
            dataset_revision=data.get("revision"),
            date=evaluate["finished"],
            notes=f"accuracy (0-1) on the {data['split']} split, {published['examples']} examples",
        )
    ]


def average_bits(bits: Mapping[str, float], weights: Sequence[Mapping[str, Any]]) -> float:
    """Average bits per element over all compressed weights, from the bits of each by name and the manifest's shapes."""
    elements = {weight["name"]: math.prod(weight["shape"]) for weight in weights}
    return sum(bits[name] * count for name, count in elements.items()) / sum(elements.values())


def published_row(evaluate: dict[str, Any]) -> dict[str, Any]:
    """Return the result row that a card publishes; empty if the stage has none."""
    return next((row for row in evaluate.get("rows", []) if row.get("published")), {})


def published_metrics(published: Mapping[str, Any]) -> list[str]:
    """List the metrics of a row that the card's metadata holds."""
    return [metric for metric in ("accuracy", "perplexity") if published.get(metric) is not None]


def build_card(manifest: Manifest) -> ModelCard:
    """Build the card of a manifest that has a quantize stage."""
    facts = _card_facts(manifest)
    return ModelCard.from_template(_metadata(facts), template_path=str(TEMPLATE), **facts)


def _card_facts(manifest: Manifest) -> dict[str, Any]:
    """Gather what the template shows from a manifest's stages."""
    stages = [manifest.last(stage) for stage in ("train", "quantize", "evaluate")]
    train, quantize, evaluate = stages
    publish = manifest.last("publish")
    config = quantize["quantization_config"]
    rows = evaluate.get("rows", [])
    published = published_row(evaluate)
    weights = quantize["weights"]
    return {
        "name": evaluate.get("name") or f"{quantize['base_model']}-{config['bits']}bit{_over(config, '-over-')}",
        "base_model": quantize["base_model"],
        "license": quantize.get("license"),
        "repo_id": publish.get("repo_id"),
        "float_revision": publish.get("float_revision"),
        "config": {**config, "bits": f"{config['bits']}{_over(config, '/')}"},
        "bits_tag": f"{config['bits']}-bit{_over(config, '-over-')}",
        "method_sentence": _method_sentence(config),
        "refinements": [REFINEMENT_SENTENCES[step] for step in config.get("refine") or ()],
        "r2_sentence": _r2_sentence(train.get("r2")),
        "distillation": train.get("distillation"),
        "activation_sentence": _activation_sentence(config.get("activations")),
        "sources": _sources(config),
        "model_class": evaluate.get("model_class") or quantize.get("model_class"),
        "pipeline_tag": evaluate.get("pipeline_tag"),
        "data": evaluate.get("data"),
        "rows": rows,
        "published": published,
        "table": result_table([rows]) if rows else None,
        "picture": evaluate.get("picture"),
        "bytes": quantize["bytes"],
        "ratio": quantize["bytes"]["float"] / quantize["bytes"]["compressed"],
        "bits_per_weight": average_bits({weight["name"]: weight["bits_per_weight"] for weight in weights}, weights),
        "weight_table": _weight_table(weights),
        "weight_count": len(weights),
        "seed": train.get("seed"),
        "recipe": evaluate.get("recipe"),
        "environment": (evaluate or quantize)["environment"],
        "commands": list(dict.fromkeys(stage["environment"]["command"] for stage in stages if stage)),
        "seconds": evaluate.get("seconds"),
    }


def _method_sentence(config: dict[str, Any]) -> str:
    if config.get("aware"):
        return AWARE_SENTENCES[config["aware"]].format(**config)
    return (VECTOR_SENTENCE if _over(config) else METHOD_SENTENCES[config["method"]]).format(**config)


def _activation_sentence(activations: dict[str, Any] | None) -> str | None:
    """Say how inputs are quantized; nothing if they are not."""
    if not activations:
        return None
    settings = ActivationSettings(**activations)
    if settings.method in INPUT_SENTENCES:
        return f"{settings.bits}-bit {INPUT_SENTENCES[settings.method].format(**asdict(settings))}"
    kind = "ternary" if settings.basis == "ternary" else f"{settings.bits}-bit"
    scales = "solved for each input" if settings.moving_average == "off" else "of running averages"
    return f"{kind} least-squares binary codes, with scales {scales}"


def _sources(config: dict[str, Any]) -> list[str]:
    used = (config.get("aware"), (config.get("activations") or {}).get("method"))
    return [source for method, source in SOURCES.items() if method in used]


def _metadata(facts: dict[str, Any]) -> ModelCardData:
    config = facts["config"]
    results = None
    if facts["published"]:
        results = [
            EvalResult(
                task_type=facts["pipeline_tag"],
                dataset_type=facts["data"].get("hub_name") or facts["data"]["name"],
                dataset_name=facts["data"]["name"],
                dataset_config=facts["data"].get("config"),
                dataset_split=facts["data"]["split"],
                dataset_revision=facts["data"].get("revision"),
                metric_type=metric,
                metric_name=metric.capitalize(),
                metric_value=facts["published"][metric],
            )
            for metric in published_metrics(facts["published"])
        ]
    return ModelCardData(
        license=facts["license"],
        base_model=facts["base_model"],
        base_model_relation="quantized",
        library_name="transformers",
        pipeline_tag=facts["pipeline_tag"],
        datasets=[facts["data"]["hub_name"]] if (facts["data"] or {}).get("hub_name") else None,
        metrics=published_metrics(facts["published"]) if results else None,
        tags=[
            "hf_r2",
            *(["range-regularization"] if facts["r2_sentence"] else []),
            config["method"],
            facts["bits_tag"],
        ],
        model_name=facts["name"] if results else None,
        eval_results=results,
    )


def _r2_sentence(r2: dict[str, Any] | None) -> str | None:
    """Say how the float model's range was restricted; nothing if it was not."""
    if not r2:
        return None
    strength = f"strength {r2['r2_strength']}"
    if r2["r2_strength"] == "auto" and r2["r2_target_crest"] is not None:
        strength = f"strengths that hold each weight at a crest factor of {r2['r2_target_crest']}"
    elif r2["r2_strength"] == "auto":
        strength = f"strengths that hold the gradient of R2 at {r2['r2_target_gradient_ratio']} of the task's"
    return RESTRICTION_SENTENCES[r2["r2_mode"]].format(loss=LOSS_SENTENCES[r2["r2_loss"]], strength=strength, **r2)


def _over(codec: dict[str, Any], separator: str = "") -> str:
    """Say over how many weights a code reaches, after a separator; nothing for one."""
    return f"{separator}{codec['cluster_dim']}" if codec.get("cluster_dim", 1) > 1 else ""


def _kind_of_basis(codec: dict[str, Any]) -> str:
    """Name the kind of a binary basis that is not the optimum; nothing for other codecs."""
    return f" {codec['basis']}" if codec.get("basis", "optimal") != "optimal" else ""


def _weight_table(weights: list[dict[str, Any]]) -> str:
    header = ("weight", "shape", "codec", "bits per weight", "crest factor", "kurtosis", "SQNR (dB)")
    rows = [
        (
            f"`{weight['name']}`",
            "×".join(map(str, weight["shape"])),
            "{method} {bits}-bit{over}{kind}, {grain}".format(
                **weight["codec"], over=_over(weight["codec"], " over "), kind=_kind_of_basis(weight["codec"])
            ),
            f"{weight['bits_per_weight']:.2f}",
            f"{weight['crest_factor']:.2f}",
            f"{weight['kurtosis']:.2f}",
            "exact" if weight["compressed_sqnr"] is None else f"{weight['compressed_sqnr']:.1f}",
        )
        for weight in weights
    ]
    return markdown_table(header, rows)
