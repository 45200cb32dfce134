"""`r2_strength="auto"`: strengths chosen while training, one per weight, so that each weight holds a target."""

import math

import torch
from torch import Tensor

from hf_r2.losses import RangeLoss
from hf_r2.moments import shapes
from hf_r2.projection import RangeProjection
from hf_r2.selection import current_weights

FIRST_STRENGTH = 0.01
"""The R2 paper's, where a search for the crest factor starts."""

LIMITS = (1e-6, 1e2)

LONGEST_STEP = 0.1
"""What a step of gradient descent on the range loss may take off the largest magnitude, as a share of it."""


class CrestTarget:
    """Holds a crest factor: the strength of a weight grows while it is above the target, and shrinks while it is below.

    A proportional and an integral part, on the logarithms of strength and crest factor:
    `ln λ = ln λ₀ + P·e + Σ I·e` with `e = ln(crest / target)`. Where the crest is twice the target, λ grows tenfold in
    about 70 steps. A loss may not be able to hold a target; its strength stops where a step would throw the largest
    elements across zero and make new outliers of them.

    Args:
        restriction: whose strengths are chosen.
        target: crest factor to hold.
    """

    PROPORTIONAL, INTEGRAL = 2.0, 0.05

    def __init__(self, restriction: RangeLoss | RangeProjection, target: float) -> None:
        self.restriction = restriction
        self.target = target
        self.state = torch.full((len(restriction.selection),), math.log(FIRST_STRENGTH), dtype=torch.float32)
        self.strengths = self.state.exp()

    @torch.no_grad()
    def update(self, learning_rate: float) -> None:
        """Choose the strengths of the next optimizer step; call it once per step, for a loss while it is measured."""
        crests = [one.crest_factor for one in shapes(current_weights(self.restriction.selection))]
        error = (torch.stack([crest.to(crests[0].device) for crest in crests]) / self.target).clamp_min(1e-3).log()
        low, high = math.log(LIMITS[0]), self._highest(learning_rate).to(error).log()
        self.state = (self.state.to(error) + self.INTEGRAL * error).clamp_min(low).minimum(high)
        self.strengths = (self.state + self.PROPORTIONAL * error).clamp_min(low).minimum(high).exp()

    def _highest(self, learning_rate: float) -> Tensor:
        if isinstance(self.restriction, RangeProjection):  # however long, its steps end at a common level
            return torch.tensor(LIMITS[1], dtype=torch.float32)
        step = learning_rate * self.restriction.gradient_peaks()
        if self.restriction.factors is not None:
            step = step * self.restriction.factors.to(step)
        return (LONGEST_STEP / step).clamp(*LIMITS)


class GradientRatioTarget:
    """Holds the norm of a weight's R2 gradient at a share of its task gradient's, on average over some ten steps.

    Args:
        restriction: whose strengths are chosen.
        target: the share.
    """

    MEMORY = 0.9

    def __init__(self, restriction: RangeLoss, target: float) -> None:
        self.restriction = restriction
        self.target = target
        self.state = torch.zeros(len(restriction.selection), dtype=torch.float32)
        self.strengths = self.state

    @torch.no_grad()
    def update(self, grad_scale: Tensor | float = 1.0) -> None:
        """Choose the strengths of the next optimizer step, from the task gradients of this one.

        Args:
            grad_scale: what these gradients are multiplied by, under a gradient scaler. Where it made them overflow,
                the strengths stay.
        """
        chosen = self.target * self.restriction.gradient_ratios() / grad_scale
        before = self.state.to(chosen)
        mean = torch.where(before > 0, before.lerp(chosen.clamp_max(LIMITS[1]), 1 - self.MEMORY), chosen)
        self.state = torch.where(chosen.isfinite(), mean.clamp_max(LIMITS[1]), before)
        self.strengths = self.state
