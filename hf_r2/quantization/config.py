"""The quantization config that a compressed checkpoint carries."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from transformers.utils.quantization_config import QuantizationConfigMixin

from hf_r2.aware import AWARE_GRIDS, AWARE_METHODS, AWARE_OPTIONS, ActivationSettings
from hf_r2.codecs import CodecSettings
from hf_r2.grain import Grain
from hf_r2.refine import in_order
from hf_r2.selection import matches

QUANT_METHOD = "hf_r2"
FORMAT_VERSION = 1
_TRAINED = ("aware", "aware_options", "activations")
_CODEC_OPTIONS = tuple(field.name for field in fields(CodecSettings))


class R2QuantizationConfig(QuantizationConfigMixin):
    """How the weights of a model are compressed.

    Args:
        method: codec: `"uniform"`, `"palette"` or `"least_squares"`.
        bits: bits of a code, 1–8 (uniform: 2–8, and 1 with grid midrise).
        grain: `"tensor"`, `"channel"` or a group size: what shares a scale, a look-up table or a basis.
        symmetric: see [`CodecSettings`].
        grid: see [`CodecSettings`]; with a method in `aware` that trains uniform grids, that method's own is the
            default: full for `"lsq"`, midrise for the others and at 1 bit.
        range: see [`CodecSettings`].
        cluster_dim: see [`CodecSettings`].
        basis: see [`CodecSettings`].
        percentile: see [`CodecSettings`].
        overrides: settings by parameter name or shell pattern: `{"classifier.*": {"bits": 8}}`, or the same as a list
            of pairs. Later ones win; one that changes the method leaves the other method's options behind.
        include: patterns of the weights to compress, see [`select_weights`]; every Linear and Conv without.
        skip: patterns of weights that stay as they are.
        min_numel: smallest number of elements that is compressed.
        aware: compression-aware training method, one of `AWARE_METHODS`, for [`attach`] and the Trainer; None
            compresses after training.
        aware_options: options of the method: see [`DKMOptions`] and [`EWGSOptions`]; the others have none.
        activations: quantization of the compressed layers' inputs, see [`ActivationSettings`]; None leaves them float.
        refine: post-training steps, taken in this order however they are listed. Before compression, without data:
            `"equalize"` (cross-layer equalization, with batch norms folded) and `"absorb_bias"`, both for ResNet,
            MobileNetV1 and MobileNetV2. As compression, on unlabelled calibration data, which only
            [`R2Quantizer.quantize`] takes: `"adaround"` (uniform codecs) or `"compensate"` (error-compensated rounding,
            any codec). After it, on such data: `"bias_correction"`, and `"batch_norm"`, which re-estimates
            batch-norm statistics.
        format_version: version of the on-disk format; written by hf_r2.
        sha256: digests of the checkpoint's content; written by hf_r2.
        **unknown: refused.

    Raises:
        ValueError: for unknown keys (with the nearest known one) and values, and for a newer format.
    """

    def __init__(
        self,
        method: str = "uniform",
        bits: int = 4,
        grain: Grain = "channel",
        symmetric: bool | None = None,
        grid: str | None = None,
        range: str | None = None,
        cluster_dim: int | None = None,
        basis: str | None = None,
        percentile: float | None = None,
        overrides: Mapping[str, Mapping[str, Any]] | Sequence[tuple[str, Mapping[str, Any]]] | None = None,
        include: Sequence[str] | None = None,
        skip: Sequence[str] | None = None,
        min_numel: int = 0,
        aware: str | None = None,
        aware_options: Mapping[str, Any] | None = None,
        activations: Mapping[str, Any] | None = None,
        refine: Sequence[str] = (),
        format_version: int = FORMAT_VERSION,
        sha256: Mapping[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown.pop("quant_method", QUANT_METHOD) != QUANT_METHOD:
            raise ValueError(f"this config is not one of quant_method {QUANT_METHOD!r}")
        if not isinstance(format_version, int) or format_version > FORMAT_VERSION or format_version < 1:
            raise ValueError(
                f"the checkpoint has format version {format_version!r}, this hf_r2 reads up to {FORMAT_VERSION}: "
                "upgrade with `pip install -U hf_r2`"
            )
        known = (*_CODEC_OPTIONS, "overrides", "include", "skip", "min_numel", *_TRAINED, "refine")
        _refuse_unknown(unknown, known, "R2QuantizationConfig")
        self.quant_method = QUANT_METHOD
        if aware is not None and aware not in tuple(AWARE_METHODS):
            raise ValueError(f"unknown method aware={aware!r}: use one of {', '.join(AWARE_METHODS)}")
        if grid is None and symmetric is not False and method == "uniform" and aware in AWARE_GRIDS:
            grid = "midrise" if bits == 1 else AWARE_GRIDS[aware]
        base = CodecSettings(method, bits, grain, symmetric, grid, range, cluster_dim, basis, percentile)
        for option in _CODEC_OPTIONS:
            setattr(self, option, getattr(base, option))
        self.overrides = _pairs(overrides)
        self.include = _strings(include, "include")
        self.skip = _strings(skip, "skip")
        self.min_numel = min_numel
        self.aware = aware
        self.aware_options = dict(_mapping(aware_options or {}, "aware_options"))
        self.refine = in_order(_strings(refine, "refine") or ())
        self._check_aware()
        self.activations = None
        if activations is not None:
            self.activations = _checked(ActivationSettings, activations, "activations").to_dict()
        if self.aware == "pact" and (self.activations or {}).get("method") != "pact":
            raise ValueError(
                "aware='pact' clips inputs, and quantizes weights as dorefa does: add activations={'method': 'pact', "
                "'bits': …}, or set aware='dorefa'"
            )
        self.format_version = format_version
        self.sha256 = sha256
        if isinstance(min_numel, bool) or not isinstance(min_numel, int) or min_numel < 0:
            raise ValueError(f"min_numel={min_numel!r} is not a whole number ≥ 0")
        if self.include == []:
            raise ValueError(
                "include is empty and would compress nothing; leave it out to compress every Linear and Conv"
            )
        for pattern, options in self.overrides:
            _refuse_unknown(options, _CODEC_OPTIONS, f"overrides[{pattern!r}]")
            _override(base, options)

    def _check_aware(self) -> None:
        if self.aware is None:
            if self.aware_options:
                raise ValueError(f"aware_options={self.aware_options} without a method: set aware to one")
            return
        beside = [step for step in self.refine if step != "batch_norm"]
        if beside:
            raise ValueError(f"refine={beside} is for post-training compression: remove it, or aware={self.aware!r}")
        codec = AWARE_METHODS[self.aware]
        if self.method != codec:
            raise ValueError(f"aware={self.aware!r} trains the codec {codec!r}: set method={codec!r}")
        if self.aware in AWARE_OPTIONS:
            _checked(AWARE_OPTIONS[self.aware], self.aware_options, "aware_options")
        elif self.aware_options:
            raise ValueError(f"aware_options={self.aware_options}: aware={self.aware!r} has none; leave them out")

    def settings_for(self, name: str | None) -> CodecSettings:
        """Return the codec settings of the weight of this name: the config's own, with every override that matches."""
        settings = CodecSettings(**{option: getattr(self, option) for option in _CODEC_OPTIONS})
        for pattern, options in self.overrides:
            if name is not None and matches(name, [pattern]):
                settings = _override(settings, options)
        return settings

    def activation_settings(self) -> ActivationSettings | None:
        """Return how inputs are quantized, if they are."""
        return None if self.activations is None else ActivationSettings(**self.activations)

    def to_dict(self) -> dict[str, Any]:
        """Return the config as JSON holds it: all that a reader needs, without what was left at None or empty.

        Overrides are a list, because transformers sorts the keys of config.json, and their order counts.
        """
        content = {"quant_method": self.quant_method, **self.settings_for(None).to_dict()}
        optional = ("overrides", "include", "skip", "min_numel", *_TRAINED, "refine")
        for key in (*optional, "format_version", "sha256"):
            if getattr(self, key):
                content[key] = getattr(self, key)
        return content

    def to_diff_dict(self) -> dict[str, Any]:
        """Return what `print(config)` shows; the same as [`to_dict`]."""
        return self.to_dict()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, R2QuantizationConfig) and self.to_dict() == other.to_dict()

    __hash__ = None


def _override(settings: CodecSettings, options: Mapping[str, Any]) -> CodecSettings:
    kept = settings.to_dict()
    if options.get("method", settings.method) != settings.method:
        kept = {"bits": settings.bits, "grain": settings.grain}
    if options.get("symmetric") is False:
        kept.pop("grid", None)
    if options.get("range", settings.range) != settings.range:
        kept.pop("percentile", None)
    return CodecSettings(**{**kept, **options})


def _pairs(overrides: Any) -> list[list[Any]]:
    pairs = list(overrides.items()) if isinstance(overrides, Mapping) else overrides or []
    sound = isinstance(pairs, list | tuple) and all(
        isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str) and isinstance(pair[1], Mapping)
        for pair in pairs
    )
    if not sound:
        raise ValueError(f"overrides maps patterns to settings ({{'classifier.*': {{'bits': 8}}}}), got {overrides!r}")
    return [[pattern, dict(options)] for pattern, options in pairs]


def _strings(values: Any, option: str) -> list[str] | None:
    if values is None:
        return None
    kind = "steps" if option == "refine" else "patterns"
    if isinstance(values, str):
        raise ValueError(f"{option} is a list of {kind}; write [{values!r}]")
    if not isinstance(values, Sequence) or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{option} is a list of {kind}, got {values!r}")
    return list(values)


def _mapping(value: Any, option: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{option} maps names to values, got {value!r}")
    return value


def _checked(kind: Any, options: Any, option: str) -> Any:
    """Build settings of a kind, which check themselves; a value that cannot even be compared is refused too."""
    _refuse_unknown(_mapping(options, option), kind.names(), option)
    try:
        return kind(**options)
    except TypeError as error:
        raise ValueError(f"{option}={options!r} has a value of another type than is asked for ({error})") from error


def _refuse_unknown(keys: Mapping[str, Any], known: Sequence[str], where: str) -> None:
    for key in sorted(set(keys) - set(known)):
        near = difflib.get_close_matches(key, known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        raise ValueError(f"unknown key {key!r} in {where}; {hint}")
