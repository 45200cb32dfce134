"""Training arguments of range regularization."""

import json
import math
from dataclasses import dataclass, field

from transformers import TrainingArguments

from hf_r2.aware import AWARE_METHODS
from hf_r2.grain import parse_grain
from hf_r2.losses import RANGE_LOSSES
from hf_r2.projection import PROJECTIONS

R2_MODES = ("loss", *PROJECTIONS, "none")


@dataclass
class R2TrainingArguments(TrainingArguments):
    """`TrainingArguments` with the fields of range regularization.

    To regularize another trainer, inherit from its arguments as well: `class R2SFTConfig(R2TrainingArguments,
    SFTConfig)` beside `class R2SFTTrainer(R2Mixin, SFTTrainer)`.

    Raises:
        ValueError: for a value outside its choices or range.
    """

    r2_mode: str = field(
        default="loss",
        metadata={
            "help": "How the range is restricted: 'loss', the paper's form, adds strength × range loss to the loss; "
            "'prox' and 'clip' pull the weights back after each optimizer step and suit any optimizer; 'none'."
        },
    )
    r2_loss: str = field(default="l_inf", metadata={"help": f"Range loss: one of {', '.join(RANGE_LOSSES)}."})
    # A number or "auto"; argument parsers know no such union, so text is turned into the number
    r2_strength: str = field(
        default=0.01,
        metadata={
            "help": "Strength λ ≥ 0. The default is the R2 paper's, for long runs; λ scales as 1 / (learning rate × "
            "steps), so runs of some hundred steps need about 0.1. 0 restricts nothing. 'auto' chooses λ for each "
            "weight so that it holds r2_target_crest or r2_target_gradient_ratio."
        },
    )
    r2_target_crest: float | None = field(
        default=None, metadata={"help": "Crest factor max|W|/rms(W) that 'auto' holds; 2, say."}
    )
    r2_target_gradient_ratio: float | None = field(
        default=None,
        metadata={"help": "Norm of the R2 gradient over the task gradient's that 'auto' holds; 0.1, say. For 'loss'."},
    )
    r2_strength_factors: dict[str, float] | str | None = field(
        default=None,
        metadata={
            "help": "Factor on the strength by pattern over parameter names, the last that matches counts; JSON on the "
            "command line."
        },
    )
    r2_clip: float = field(
        default=1.5,
        metadata={"help": "Largest |W| in units of the group's rms, for 'clip'; infinity restricts nothing."},
    )
    r2_warmup_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps over which the strength rises linearly from 0."}
    )
    r2_start_ratio: float = field(default=0.0, metadata={"help": "Share of the steps after which restriction begins."})
    r2_end_ratio: float = field(default=1.0, metadata={"help": "Share of the steps after which it ends."})
    r2_grain: str = field(
        default="tensor",
        metadata={
            "help": "Groups whose range is restricted: 'tensor', 'channel' or a group size; match the quantizer's."
        },
    )
    r2_include: list[str] | None = field(
        default=None,
        metadata={"help": "Patterns over parameter names to regularize; every Linear and Conv without."},
    )
    r2_exclude: list[str] | None = field(default=None, metadata={"help": "Patterns over parameter names to leave out."})
    r2_min_numel: int = field(default=0, metadata={"help": "Smallest number of elements that is regularized."})
    r2_tail_fraction: float = field(default=0.01, metadata={"help": "Share of the elements in the tail, for 'tail'."})
    r2_temperature: float | None = field(
        default=None,
        metadata={
            "help": "First temperature relative to 1/rms of the weight, for 'soft_min_max'; without it, the one at "
            "which the loss sees 90 % of each range."
        },
    )
    r2_margin_reduction: str = field(
        default="max", metadata={"help": "'max' or 'sum' over the elements, for 'margin'."}
    )
    r2_learning_rate: float = field(
        default=0.01, metadata={"help": "Learning rate of learnable margins and temperatures (plain SGD)."}
    )

    r2_aware: str | None = field(
        default=None,
        metadata={
            "help": f"Compression-aware training: one of {', '.join(AWARE_METHODS)}; needs a quantization_config. The "
            "trained model is compressed."
        },
    )
    r2_aware_start_ratio: float = field(
        default=0.0, metadata={"help": "Share of the steps after which compression-aware training begins."}
    )

    r2_teacher: str | None = field(
        default=None,
        metadata={
            "help": "Float model to distil from: a local path or a name on the Hub; or 'start', the model as the "
            "trainer gets it."
        },
    )
    r2_distillation_temperature: float = field(
        default=1.0, metadata={"help": "Temperature T > 0 that both models' logits are divided by."}
    )
    r2_distillation_share: float = field(
        default=1.0,
        metadata={"help": "Share s in (0, 1] of the distillation: the loss is (1 − s) × task loss + s × T² × KL."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, choices in {
            "r2_mode": R2_MODES,
            "r2_loss": RANGE_LOSSES,
            "r2_margin_reduction": ("max", "sum"),
        }.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is not one of {', '.join(choices)}")
        self._parse_texts()
        numbers = ("r2_strength", "r2_learning_rate", "r2_min_numel", "r2_temperature", "r2_clip", "r2_tail_fraction")
        targets = ("r2_target_crest", "r2_target_gradient_ratio")
        for name in (*numbers, *targets, "r2_warmup_ratio", "r2_start_ratio", "r2_end_ratio"):
            value = getattr(self, name)
            unlimited = name == "r2_clip" and value == math.inf
            if (value is None and name in (*targets, "r2_temperature")) or (name == "r2_strength" and value == "auto"):
                continue
            if not isinstance(value, int | float) or not (math.isfinite(value) or unlimited) or value < 0:
                raise ValueError(f"{name}={value!r} is not a number ≥ 0")
        self._check_auto()
        if self.r2_aware is not None and self.r2_aware not in AWARE_METHODS:
            raise ValueError(f"r2_aware={self.r2_aware!r} is not one of {', '.join(AWARE_METHODS)}")
        if not 0 <= self.r2_aware_start_ratio < 1:
            raise ValueError(f"r2_aware_start_ratio={self.r2_aware_start_ratio} is not in [0, 1)")
        if not 0 < self.r2_distillation_temperature < math.inf:
            raise ValueError(f"r2_distillation_temperature={self.r2_distillation_temperature} is not a number > 0")
        if not 0 < self.r2_distillation_share <= 1:
            raise ValueError(
                f"r2_distillation_share={self.r2_distillation_share} is not in (0, 1]: without a teacher, leave out "
                "r2_teacher"
            )
        if not self.r2_clip > 1:
            raise ValueError(f"r2_clip={self.r2_clip} is not above 1, the rms itself")
        if not 0 <= self.r2_start_ratio < self.r2_end_ratio <= 1:
            raise ValueError(
                f"r2_start_ratio={self.r2_start_ratio} and r2_end_ratio={self.r2_end_ratio} are not 0 ≤ start < end ≤ 1"
            )
        if not 0 <= self.r2_warmup_ratio <= 1:
            raise ValueError(f"r2_warmup_ratio={self.r2_warmup_ratio} is not in [0, 1]")
        if not 0 < self.r2_tail_fraction <= 1:
            raise ValueError(f"r2_tail_fraction={self.r2_tail_fraction} is not in (0, 1]")
        try:
            parse_grain(self.r2_grain)
        except ValueError as error:
            raise ValueError(f"r2_grain: {error}") from error

    def _parse_texts(self) -> None:
        if isinstance(self.r2_strength, str) and self.r2_strength != "auto":
            try:
                self.r2_strength = float(self.r2_strength)
            except ValueError:
                raise ValueError(f"r2_strength={self.r2_strength!r} is neither a number ≥ 0 nor 'auto'") from None
        if isinstance(self.r2_strength_factors, str):
            try:
                self.r2_strength_factors = json.loads(self.r2_strength_factors)
            except ValueError as error:
                raise ValueError(f"r2_strength_factors={self.r2_strength_factors!r} is not JSON: {error}") from error

    def _check_auto(self) -> None:
        targets = [self.r2_target_crest, self.r2_target_gradient_ratio]
        stated = [target for target in targets if target is not None]
        if self.r2_strength != "auto":
            if stated:
                raise ValueError("a target is held by r2_strength='auto' only, and r2_strength is a number")
            return
        if len(stated) != 1:
            raise ValueError("r2_strength='auto' needs one target: r2_target_crest or r2_target_gradient_ratio")
        if self.r2_mode not in ("loss", "prox"):
            raise ValueError(f"r2_mode={self.r2_mode!r} has no strength to choose: 'clip' holds a crest factor itself")
        if self.r2_target_crest is not None and not self.r2_target_crest > 1:
            raise ValueError(f"r2_target_crest={self.r2_target_crest} is not above 1, the lowest there is")
        if self.r2_target_gradient_ratio is not None and self.r2_mode != "loss":
            raise ValueError(f"r2_mode={self.r2_mode!r} has no gradient: give r2_target_crest")

    def r2_share(self, progress: float) -> float:
        """Return the share of the strength, 0–1, at this progress of the training, 0–1."""
        if not self.r2_start_ratio <= progress < self.r2_end_ratio:
            return 0.0
        if self.r2_warmup_ratio == 0:
            return 1.0
        return min(1.0, (progress - self.r2_start_ratio) / self.r2_warmup_ratio)
