"""LSQ: quantize weights and inputs to uniform grids whose step is learned (Esser et al., arXiv 1902.08153).

With the step s, levels from −Q_N to Q_P in its units and b bits, `v̂ = s · round(clip(v / s, −Q_N, Q_P))`. The gradient
(section 2.1) passes to v where it is inside of the levels. To s it is `round(v / s) − v / s` inside, and −Q_N or Q_P
where v is clipped, times 1 / √(N · Q_P) for N elements that share the step (section 2.2).

One bit has the levels ±s / 2, whichever s is, so there ∂v̂ / ∂s is the level of v in units of s, its exact derivative.
"""

from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.input_quantizer import LearnedInputs, averaged
from hf_r2.aware.uniform_weight import LEAST, UniformWeight
from hf_r2.codecs import CodecSettings
from hf_r2.codecs.settings import GRIDS
from hf_r2.codecs.uniform import code_limits, divisor, nearest


class LSQ(UniformWeight):
    """Parametrization of a weight by a grid of learned step; see [`UniformWeight`].

    The grid `"full"` is the paper's, Q_N = 2^(b−1) and Q_P = Q_N − 1. `"restricted"` has Q_N = Q_P, and three levels at
    2 bits (ternary); `"midrise"` has Q_N = Q_P = 2^(b−1) − ½ and no zero, and is the one of 1 bit.
    """

    learned = trained = ("scale",)
    grids = GRIDS

    def first_values(self, block: Tensor) -> dict[str, Tensor]:
        """Begin with `s = 2 E|v| / √Q_P` (section 2.1); at one bit with 2 E|v|, whose levels ±E|v| are the nearest."""
        return {"scale": first_step(block, self.highest, self.settings.bits)}

    def codes_and_scale(self, block: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Take the nearest levels; a step that the optimizer has taken below zero counts by its magnitude."""
        scale = scale.abs()
        return nearest(block, scale, self.offset, self.settings), scale

    def train_block(self, block: Tensor, scale: Tensor) -> Tensor:
        """Take the nearest levels, with LSQ's gradient."""
        return LearnedStep.apply(block, scale, self.offset, self.settings, block.shape[1])

    @property
    def highest(self) -> float:
        """Q_P, the highest level in units of the step."""
        return 2**self.settings.bits - 1 - self.offset


def first_step(block: Tensor, highest: Tensor | float, bits: int) -> Tensor:
    """Return the first step of every group, `(groups,)`; see [`LSQ.first_values`]."""
    return (2 * block.abs().mean(dim=1) / (highest**0.5 if bits > 1 else 1)).clamp_min(LEAST)


class LearnedStep(torch.autograd.Function):
    """LSQ of a block: `apply(block, step, offset, settings, elements)`; see the module for the gradient.

    Args:
        block: v, float32 `(groups, n)`.
        step: s, `(groups,)`; its magnitude counts.
        offset: code of zero, a number or a scalar tensor; may lie half a step from codes.
        settings: bits and grid, whose codes, from the lowest to 2^bits − 1, stand for `(code − offset) · s`.
        elements: N, what share a step.
    """

    @staticmethod
    def forward(
        ctx: Any, block: Tensor, step: Tensor, offset: Tensor | float, settings: CodecSettings, elements: int
    ) -> Tensor:
        """Return the nearest levels, shape of the block."""
        size = step.abs()
        units = nearest(block, size, offset, settings) - offset
        ctx.save_for_backward(block, step, units)
        ctx.offset, ctx.settings, ctx.elements = offset, settings, elements
        return units * size[:, None]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple:
        """Return the gradient to the block and to the step; differentiable once more."""
        block, step, units = ctx.saved_tensors
        exact = block / divisor(step.abs())[:, None]
        lowest, highest = (code - ctx.offset for code in code_limits(ctx.settings))
        inside = (exact >= lowest) & (exact <= highest)
        slope = units if ctx.settings.bits == 1 else torch.where(inside, units - exact, units)
        factor = (ctx.elements * highest) ** -0.5
        return grad * inside, (grad * slope).sum(dim=1) * step.sign() * factor, None, None, None


class LSQInputs(LearnedInputs):
    """Quantizes the input of a layer by one learned step: 0 … 2^b − 1 steps if the first batch had no negative values.

    Else the levels are −2^(b−1) … 2^(b−1) − 1 steps. The step begins with `2 E|x| / √Q_P` of the first batch; N in its
    gradient counts the elements of one example (section 2.2).
    """

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        self.scale = nn.Parameter(torch.ones(1, dtype=torch.float32))
        self.register_buffer("offset", torch.zeros((), dtype=torch.float32))
        self.grid = CodecSettings("uniform", self.settings.bits, grid="full")

    def begin(self, inputs: Tensor) -> None:
        """Choose sign and step by a batch."""
        half = 2.0 ** (self.settings.bits - 1)
        statistics = averaged(torch.stack([inputs.abs().mean(), (inputs < 0).any().float()]))
        self.offset.copy_(half * (statistics[1] > 0))
        self.scale.copy_(first_step(statistics[:1, None], 2 * half - 1 - self.offset, self.settings.bits))

    def rounded(self, inputs: Tensor) -> Tensor:
        """Quantize, with LSQ's gradient."""
        block = inputs.reshape(1, -1)
        elements = inputs[0].numel()
        return LearnedStep.apply(block, self.scale.float(), self.offset, self.grid, elements).view(inputs.shape)
