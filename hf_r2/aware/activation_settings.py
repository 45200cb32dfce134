"""How the inputs of layers are quantized: `R2QuantizationConfig.activations`."""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

from hf_r2.codecs.settings import CodecSettings

ACTIVATION_METHODS = ("least_squares", "uniform", "lsq", "pact", "dorefa", "ewgs")
LEARNED = ("lsq", "pact", "ewgs")
"""Methods whose values are learned with the weights."""

MOVING_AVERAGES = ("off", "eval_only", "train_and_eval")
RANGES = ("dynamic", "static")
GRAINS = ("tensor", "token")

_OPTIONS = {
    "basis": ("least_squares",),
    "centred": ("least_squares",),
    "clip": ("least_squares",),
    "moving_average": ("least_squares",),
    "momentum": ("least_squares", "uniform"),
    "range": ("uniform",),
    "grain": ("uniform",),
    "symmetric": ("uniform",),
    "delta": ("ewgs",),
}
"""Options, each with the methods that have it."""


@dataclass(frozen=True)
class ActivationSettings:
    """How the inputs of layers are quantized: `R2QuantizationConfig.activations`.

    Args:
        bits: bits of a code: 1–8 for least_squares, 2–8 for the others.
        method: `"least_squares"` (binary codes, the default); `"uniform"`, which rounds to an equally spaced grid; or
            one that trains the grid (`"lsq"`, `"pact"`, `"ewgs"`) or fixes it at [0, 1] (`"dorefa"`). `"pact"` and
            `"dorefa"` set negative inputs to zero: they are for what comes from a ReLU.
        basis: least_squares: `"optimal"` (1 and 2 bits, the default there), `"greedy"` (any, the default beyond) or
            `"ternary"` (2 bits, levels −2v, 0, 2v), see [`CodecSettings`].
        centred: least_squares: subtract each group's mean before, and add it after. Without it, as in the paper, levels
            lie symmetrically around zero: right for the outputs of a normalization, but of what comes from a ReLU one
            bit would keep nothing.
        clip: least_squares: inputs beyond this many standard deviations of their group count as that far away, and pass
            no gradient. The paper's 2 for one bit and 3 for two, which it applies to normalized inputs, are the
            default: 2 at one bit, else 3.
        moving_average: least_squares: `"off"` solves for the scales of every group at any time; `"eval_only"` evaluates
            with running averages over training, or over calibration data; `"train_and_eval"` trains with them, too.
        momentum: share of a running average that stays at every batch.
        range: uniform: `"dynamic"` takes the smallest and the largest value of every group at any time; `"static"`
            has one range per layer, over all calibration data or the running average of it over training (so
            `moving_average` is `"train_and_eval"` then).
        grain: uniform: what shares a dynamic range: an example (`"tensor"`), or a token of a linear layer (`"token"`).
        symmetric: uniform: levels on both sides of zero, or (the default) a grid with a zero point.
        delta: ewgs: δ ≥ 0 of its gradient.
        skip: patterns of the weights whose layers keep their inputs.

    Raises:
        ValueError: for a value out of its range, and for an option that the method does not have.
    """

    bits: int = 2
    method: str = "least_squares"
    basis: str | None = None
    centred: bool = True
    clip: float | None = None
    moving_average: str = "off"
    momentum: float = 0.99
    range: str = "dynamic"
    grain: str = "tensor"
    symmetric: bool = False
    delta: float = 1e-3
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.method not in ACTIVATION_METHODS:
            raise ValueError(f"unknown activations method {self.method!r}: use one of {', '.join(ACTIVATION_METHODS)}")
        for option, methods in _OPTIONS.items():
            if self.method not in methods and getattr(self, option) != getattr(ActivationSettings, option):
                raise ValueError(
                    f"{option!r} of activations is an option of {' and '.join(methods)}; remove it for {self.method!r}"
                )
        if self.method == "least_squares":
            self._complete_least_squares()
        else:
            self._check_uniform()
        if not 0 <= self.momentum < 1:
            raise ValueError(f"momentum={self.momentum} is not in [0, 1)")
        if not 0 <= self.delta < math.inf:
            raise ValueError(f"delta={self.delta} is not a number ≥ 0")
        if isinstance(self.skip, str):
            raise ValueError(f"skip is a list of patterns; write [{self.skip!r}]")
        object.__setattr__(self, "skip", tuple(self.skip))

    def _complete_least_squares(self) -> None:
        if self.basis is None:
            object.__setattr__(self, "basis", "optimal" if self.bits in (1, 2) else "greedy")
        CodecSettings("least_squares", self.bits, "tensor", basis=self.basis)
        if self.basis == "optimal" and self.bits > 2:
            raise ValueError(f"activations of {self.bits} bits need basis='greedy': optimal ones have 1 or 2 bits")
        if not isinstance(self.centred, bool):
            raise ValueError(f"centred={self.centred!r} is not true or false")
        if self.clip is None:
            object.__setattr__(self, "clip", 2.0 if self.bits == 1 else 3.0)
        if not self.clip > 0:
            raise ValueError(f"clip={self.clip} is not above 0")
        if self.moving_average not in MOVING_AVERAGES:
            raise ValueError(f"unknown moving_average {self.moving_average!r}: use one of {', '.join(MOVING_AVERAGES)}")

    def _check_uniform(self) -> None:
        if isinstance(self.bits, bool) or not isinstance(self.bits, int) or not 2 <= self.bits <= 8:
            raise ValueError(
                f"bits={self.bits!r} is not a whole number from 2 to 8 for activations of method {self.method!r}; "
                "method='least_squares' goes down to 1"
            )
        for option, choices in {"range": RANGES, "grain": GRAINS, "symmetric": (True, False)}.items():
            if getattr(self, option) not in choices:
                raise ValueError(
                    f"{option}={getattr(self, option)!r} of activations is not one of {', '.join(map(str, choices))}"
                )
        if self.range == "static":
            if self.grain == "token":
                raise ValueError("a static range is one for all tokens: set grain='tensor', or range='dynamic'")
            object.__setattr__(self, "moving_average", "train_and_eval")

    @property
    def learned(self) -> bool:
        """Whether training has to find values first."""
        return self.method in LEARNED

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the names of the settings."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults, and the bits, as JSON holds them."""
        chosen = {"method": self.method, "range": self.range}
        # Others follow from these
        defaults = asdict(ActivationSettings(self.bits, **chosen))
        content = {key: value for key, value in asdict(self).items() if value != defaults[key]}
        content |= {key: value for key, value in chosen.items() if value != getattr(ActivationSettings, key)}
        if self.skip:
            content["skip"] = list(self.skip)
        return {"bits": self.bits, **content}
