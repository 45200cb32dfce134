"""PACT: inputs clipped at a learned value (Choi et al., arXiv 1805.06085)."""

import torch
from torch import Tensor, nn

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.gradients import StraightThrough
from hf_r2.aware.input_quantizer import LearnedInputs, largest
from hf_r2.aware.uniform_weight import LEAST
from hf_r2.codecs.uniform import divisor


class PACTInputs(LearnedInputs):
    """Clips the input of a layer to [0, α] and rounds it to 2^b levels there, with α learned.

    `y = clip(x, 0, α)` and `y_q = round(y (2^b − 1) / α) · α / (2^b − 1)` (section 3). The gradient passes to x inside,
    and to α where x ≥ α. The paper's L2 penalty on α, which makes it shrink, is weight decay: [`R2Trainer`] leaves it
    on, as it does for no other learned value. α begins with the largest input of the first batch (the paper begins at
    a fixed large value, 10); its magnitude counts, should the optimizer take it below zero.
    """

    penalized = ("alpha",)

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        self.alpha = nn.Parameter(torch.ones(1, dtype=torch.float32))

    def begin(self, inputs: Tensor) -> None:
        """Clip nothing at first."""
        self.alpha.copy_(largest(inputs.amax().reshape(1)).clamp_min(LEAST))

    def rounded(self, inputs: Tensor) -> Tensor:
        """Clip and round."""
        alpha, steps = self.alpha.float().abs(), 2**self.settings.bits - 1
        clipped = torch.where(inputs >= alpha, alpha, inputs.clamp_min(0))
        step = alpha.detach() / steps
        return StraightThrough.apply(clipped, (clipped.detach() / divisor(step)).round() * step)
