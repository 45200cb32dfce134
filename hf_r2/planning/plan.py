"""From a float checkpoint and a target to the config that `quantize` reads."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from hf_r2.codecs import CodecSettings
from hf_r2.grain import Grain
from hf_r2.planning.calibration import CalibratedModel
from hf_r2.planning.choices import Choices, Settings, Target
from hf_r2.planning.losses import measured_losses
from hf_r2.planning.search import Point, Search
from hf_r2.planning.sensitivity import SENSITIVITIES
from hf_r2.planning.source import FloatCheckpoint
from hf_r2.quantization.config import R2QuantizationConfig


@dataclass(frozen=True)
class PlannedWeight:
    """What a weight is to become.

    Args:
        settings: of its codec.
        shape: its shape, output channels first.
        nbytes: bytes of its codes and codebook.
        loss: its sensitivity to that.
    """

    settings: CodecSettings
    shape: tuple[int, ...]
    nbytes: int
    loss: float


@dataclass(frozen=True)
class Plan:
    """What was found.

    Args:
        config: what `quantize` reads.
        weights: by name.
        sensitivity: what losses are, one of `SENSITIVITIES`.
        point: the plan as a whole.
        allocated: the allocation that it began with, by sensitivities alone; None where recovery was the target.
        gap: by which share of its predicted loss the allocation may miss the best one; 0 is optimal.
        front: points of the Pareto front.
        uniform: points of the same method and bits for all weights.
        best_uniform: the one of them that meets the same target and is best; None if none does.
    """

    config: R2QuantizationConfig
    weights: dict[str, PlannedWeight]
    sensitivity: str
    point: Point
    allocated: Point | None
    gap: float
    front: list[Point]
    uniform: list[Point]
    best_uniform: Point | None


def plan_checkpoint(
    source: str,
    method: str = "palette",
    grain: Grain = "channel",
    target_bytes: int | None = None,
    target_bits: float | None = None,
    min_recovery: float | None = None,
    batches: Iterable[Mapping[str, Tensor]] | None = None,
    sensitivity: str | None = None,
    include: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    min_numel: int = 0,
) -> Plan:
    """Choose codec and bits of every weight of a float checkpoint.

    Without data, memory follows the largest weight. With data, the allocation is measured beside the uniform settings
    that fit the target and allocations by cheaper sensitivities, and improved by [`Search.improve`]. It takes the place
    of uniform settings only where it is better than these by two standard errors, and where its divergence from the
    float model is smaller.

    Args:
        source: directory or Hub name.
        method: codec, or `"any"`, which may be another one for every weight.
        grain: what shares a codebook, for every weight.
        target_bytes: bytes of the weight files, headers and what is not compressed included.
        target_bits: bits per compressed weight, codebooks included.
        min_recovery: least share of the float model's accuracy on the data, over 0 and up to 1, see [`Search.reach`].
        batches: keyword arguments of the model with `labels`, see [`CalibratedModel`]; of examples that the model was
            not trained on, which tell more about it, and that no figures are reported of.
        sensitivity: see `hf_r2.planning.sensitivity`; by default `"kl"` with data and `"sqnr"` without.
        include: see `select_weights`.
        skip: patterns of weights that stay as they are.
        min_numel: smallest number of elements that is compressed.

    Raises:
        ValueError: unless exactly one target is given; for one outside what the choices can do, naming that; for a
            recovery or a sensitivity that needs data, without data; and as `select_weights` does.
    """
    sensitivity = sensitivity or ("sqnr" if batches is None else "kl")
    _check(target_bytes, target_bits, min_recovery, batches is not None, sensitivity)
    checkpoint = FloatCheckpoint(source, include, skip, min_numel)
    choices = Choices(checkpoint, method, grain)
    target = None if min_recovery is not None else Target(choices, target_bytes, target_bits)
    model = None if batches is None else CalibratedModel(source, checkpoint, batches)
    if target is None and not model.labelled:
        raise ValueError("recovery takes labelled data, of which the float model predicts some right")
    losses = measured_losses(choices, sensitivity, model)
    search = Search(choices, dict(reversed(losses.items())), model)
    allocated, gap = None, 0.0
    if target is None:
        point, best_uniform = search.reach(min_recovery)
    else:
        allocated, gap = search.allocate(target)
        best_uniform = search.best_uniform(target)
        point = allocated if model is None else search.improve(allocated, target)
    weights = {
        name: PlannedWeight(settings, tuple(weight.shape), weight.nbytes(settings), own[choice])
        for (name, weight), settings, own, choice in zip(
            checkpoint.weights.items(),
            point.settings.values(),
            losses[sensitivity],
            choices.index(point.settings),
            strict=True,
        )
    }
    config = _config(point.settings, include, skip, min_numel)
    return Plan(config, weights, sensitivity, point, allocated, gap, search.front(), search.uniform, best_uniform)


def _check(
    target_bytes: int | None, target_bits: float | None, min_recovery: float | None, data: bool, sensitivity: str
) -> None:
    if sum(target is not None for target in (target_bytes, target_bits, min_recovery)) != 1:
        raise ValueError("give exactly one of a target size, target bits and a least recovery")
    if min_recovery is not None and not 0 < min_recovery <= 1:
        raise ValueError(f"a least recovery of {min_recovery!r} is not a share over 0 and up to 1, such as 0.99")
    if sensitivity not in SENSITIVITIES:
        raise ValueError(f"unknown sensitivity {sensitivity!r}: use one of {', '.join(SENSITIVITIES)}")
    if not data and min_recovery is not None:
        raise ValueError("a least recovery is measured: give labelled data, or a target size or target bits")
    if not data and SENSITIVITIES[sensitivity]:
        raise ValueError(f"sensitivity {sensitivity!r} is measured: give data, or use sensitivity 'sqnr'")


def _config(
    settings: Settings, include: Sequence[str] | None, skip: Sequence[str] | None, min_numel: int
) -> R2QuantizationConfig:
    """Write settings as a config: the most frequent ones for all weights, and overrides for the others."""
    ((base, _),) = Counter(settings.values()).most_common(1)
    overrides = {name: _differing(own, base) for name, own in settings.items() if own != base}
    return R2QuantizationConfig(
        base.method, base.bits, base.grain, overrides=overrides, include=include, skip=skip, min_numel=min_numel
    )


def _differing(settings: CodecSettings, base: CodecSettings) -> dict[str, Any]:
    own = {"method": settings.method, "bits": settings.bits}
    return {key: value for key, value in own.items() if value != getattr(base, key)}
