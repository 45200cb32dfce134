"""The refinement steps, and their one order."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import PreTrainedModel

from hf_r2.codecs import Encoded
from hf_r2.codecs.encoded import SettingsByName
from hf_r2.refine.absorption import absorb_bias
from hf_r2.refine.adaptive_rounding import adaround
from hf_r2.refine.batch_norm import reestimate_batch_norm
from hf_r2.refine.bias_correction import ExpectedOutput, correct_bias, expected_outputs
from hf_r2.refine.capture import Batches
from hf_r2.refine.compensation import compensate
from hf_r2.refine.equalization import equalize

REFINEMENTS = {
    "equalize": False,
    "absorb_bias": False,
    "adaround": True,
    "compensate": True,
    "bias_correction": True,
    "batch_norm": True,
}
"""Steps in the order in which they are taken, and whether they need calibration data."""

_ON_FLOATS = {"equalize": equalize, "absorb_bias": absorb_bias}
_ROUNDINGS = {"adaround": adaround, "compensate": compensate}


def in_order(steps: Collection[str]) -> list[str]:
    """Check the names of steps, and put them into their order.

    Raises:
        ValueError: for an unknown step, and for two that exclude each other.
    """
    for step in steps:
        if step not in REFINEMENTS:
            raise ValueError(f"unknown refinement {step!r}: use one of {', '.join(REFINEMENTS)}")
    if set(_ROUNDINGS) <= set(steps):
        raise ValueError("adaround and compensate both round the weights: keep one of them in refine")
    return [step for step in REFINEMENTS if step in steps]


def refuse_steps_with_data(steps: Collection[str]) -> None:
    """Raise a ValueError if a step needs calibration data, where there is none."""
    needing = [step for step in steps if REFINEMENTS[step]]
    if needing:
        raise ValueError(
            f"refine={needing} needs calibration data: use R2Quantizer.from_pretrained(…).quantize(…, "
            "calibration_dataset=…), or remove it from refine"
        )


def refine_floats(model: PreTrainedModel, steps: Collection[str]) -> None:
    """Take the steps before compression, `equalize` and `absorb_bias`, on a float model in place."""
    for step, function in _ON_FLOATS.items():
        if step in steps:
            function(model)


@dataclass
class Refinement:
    """The steps at and after compression, which look at calibration data.

    Args:
        steps: names of `REFINEMENTS`.
        selection: the weights that are compressed.
        batches: calibration data; may be empty if no step needs any.
    """

    steps: Collection[str]
    selection: Mapping[str, tuple[nn.Module, str]]
    batches: Batches
    expected: dict[str, ExpectedOutput] = field(default_factory=dict)

    def round_weights(self, model: PreTrainedModel, config: SettingsByName) -> dict[str, Encoded]:
        """Round by `adaround` or `compensate`, and note mean outputs for `bias_correction`, in a float model.

        Returns:
            Compressed weights by name; empty without a step that rounds.
        """
        if "bias_correction" in self.steps:
            self.expected = expected_outputs(model, self.selection, self.batches)
        for step, function in _ROUNDINGS.items():
            if step in self.steps:
                return function(model, self.selection, config, self.batches)
        return {}

    def correct(self, model: PreTrainedModel) -> None:
        """Take the steps `bias_correction` and `batch_norm` on the compressed model."""
        if "bias_correction" in self.steps:
            correct_bias(model, self.selection, self.expected, self.batches)
        if "batch_norm" in self.steps:
            reestimate_batch_norm(model, self.batches)
