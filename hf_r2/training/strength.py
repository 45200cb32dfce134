"""`r2_strength="auto"`: strengths chosen while training, one per weight, so that each weight holds a target."""

import math

import torch

from hf_r2.losses import RangeLoss
from hf_r2.moments import shapes
from hf_r2.projection import RangeProjection
from hf_r2.selection import current_weights

FIRST_STRENGTH = 0.01
"""The R2 paper's, where a search for the crest factor starts."""

LIMITS = (1e-6, 1e2)


class CrestTarget:
    """Holds a crest factor: the strength of a weight grows while it is above the target, and shrinks while it is below.

    A proportional and an integral part, on the logarithms of strength and crest factor:
    `ln λ = ln λ₀ + P·e + Σ I·e` with `e = ln(crest / target)`. Where the crest is twice the target, λ grows tenfold in
    about 70 steps.

    Args:
        restriction: whose strengths are chosen.
        target: crest factor to hold.
    """

    PROPORTIONAL, INTEGRAL = 2.0, 0.05

    def __init__(self, restriction: RangeLoss | RangeProjection, target: float) -> None:
        self.restriction = restriction
        self.target = target
        self.state = torch.full((len(restriction.selection),), math.log(FIRST_STRENGTH))
        self.strengths = self.state.exp()

    @torch.no_grad()
    def update(self) -> None:
        """Choose the strengths of the next optimizer step; call it once per step."""
        crests = [one.crest_factor for one in shapes(current_weights(self.restriction.selection))]
        error = (torch.stack([crest.to(crests[0].device) for crest in crests]) / self.target).clamp_min(1e-3).log()
        low, high = map(math.log, LIMITS)
        self.state = (self.state.to(error) + self.INTEGRAL * error).clamp(low, high)
        self.strengths = (self.state + self.PROPORTIONAL * error).clamp(low, high).exp()


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
        self.state = torch.zeros(len(restriction.selection))
        self.strengths = self.state

    @torch.no_grad()
    def update(self) -> None:
        """Choose the strengths of the next optimizer step, from the task gradients of this one."""
        chosen = self.target * self.restriction.gradient_ratios()
        chosen = chosen.where(chosen < LIMITS[1], LIMITS[1])
        self.state = torch.where(self.state.to(chosen) > 0, self.state.to(chosen).lerp(chosen, 1 - self.MEMORY), chosen)
        self.strengths = self.state
