"""EWGS: gradients of rounding scaled element by element (Lee et al., arXiv 2104.00903).

What is quantized is mapped to `x_n = clip((x − l) / (u − l), 0, 1)` with learned l and u, and rounded to one of L = 2^b
levels, `x_q = round((L − 1) x_n) / (L − 1)`. The gradient g at x_q becomes `g · (1 + δ sign(g) (x_n − x_q))` at x_n
(equation 5): larger where it pulls x_n away from the level it is nearest to; δ = 0 is straight through.

The paper trains l, u and the output scale by an optimizer of their own, Adam at a learning rate of 1e-5. Here they
share the weights', and their gradients, sums over N elements, are divided by √(N (L − 1)), as LSQ does for steps (arXiv
1902.08153, section 2.2).
"""

import math
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.gradients import ScaledGradient
from hf_r2.aware.input_quantizer import LearnedInputs, averaged, largest
from hf_r2.aware.uniform_weight import LEAST, UniformWeight
from hf_r2.codecs import CodecSettings

HESSIAN = "hessian"

HALF_NORMAL = math.sqrt(1 - 2 / math.pi)
"""Standard deviation of |z| for a normal z of variance 1, as after a ReLU without its zeros."""


@dataclass(frozen=True)
class EWGSOptions:
    """Options of EWGS: `R2QuantizationConfig.aware_options`.

    Args:
        delta: δ ≥ 0 of all weights; or `"hessian"`: every quantizer, those of inputs too, has its own from second
            derivatives, which R2Trainer finds when compression begins and with every epoch. In a loop of your own, call
            `hf_r2.aware.ewgs_delta.update_deltas` then; until the first call δ is 0.

    Raises:
        ValueError: for a value out of its range.
    """

    delta: float | str = 1e-3

    def __post_init__(self) -> None:
        if self.delta != HESSIAN and (isinstance(self.delta, str) or not 0 <= self.delta < math.inf):
            raise ValueError(f"delta={self.delta!r} is neither a number ≥ 0 nor {HESSIAN!r}")

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """List the names of the options."""
        return tuple(field.name for field in fields(cls))

    def to_dict(self) -> dict[str, Any]:
        """Return what differs from the defaults."""
        return {key: value for key, value in asdict(self).items() if value != getattr(type(self), key)}


class Round(torch.autograd.Function):
    """Round values of [0, 1] to the numbers of levels, `apply(x_n, steps, delta)`, with the gradient of EWGS.

    Args:
        x_n: float32, any shape.
        steps: L − 1; the result is `(L − 1) x_q`, in 0 … L − 1.
        delta: δ, a scalar tensor.
    """

    @staticmethod
    def forward(ctx: Any, x_n: Tensor, steps: int, delta: Tensor) -> Tensor:
        """Return numbers of levels, in float32."""
        codes = (x_n * steps).round()
        ctx.save_for_backward(x_n, codes, delta)
        ctx.steps = steps
        return codes

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        """Scale the gradient; differentiable once more, for the trace of the Hessian."""
        x_n, codes, delta = ctx.saved_tensors
        distance = x_n - codes / ctx.steps
        return grad * ctx.steps * (1 + delta * grad.sign() * distance), None, None


def normalized(block: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """Return x_n of a block `(groups, n)` for bounds `(groups,)`; a range that has closed counts as very narrow."""
    width = (upper - lower).clamp_min(LEAST)
    return ((block - lower[:, None]) / width[:, None]).clamp(0, 1)


class EWGS(UniformWeight):
    """Parametrization of a weight by levels in [−1, 1] times a learned scale; see [`UniformWeight`].

    The weight is `2 (x_q − ½) |o|`, whose codes are those of the codec's midrise grid of scale `2 |o| / (L − 1)`. The
    paper multiplies the layer's output by |o|, which is the same. l and u begin at ∓3 standard deviations of the
    group. o begins with `mean|w| / mean|2 (x_q − ½)|`: the paper's ratio, of weights instead of a batch's outputs.

    Args:
        weight: see [`UniformWeight`], as the others.
        settings: of the codec.
        options: see [`EWGSOptions`].
        transpose: see there.
        name: see there.
    """

    watched: list[Tensor] | None = None
    """Collects codes while [`update_deltas`] looks at them."""

    learned = ("lower", "upper", "output")
    trained = (*learned, "delta")

    def __init__(
        self, weight: Tensor, settings: CodecSettings, options: EWGSOptions, transpose: bool, name: str
    ) -> None:
        super().__init__(weight, settings, transpose, name)
        self.steps = 2**settings.bits - 1
        first = 0.0 if options.delta == HESSIAN else options.delta
        delta = torch.full((), first, dtype=torch.float32, device=weight.device)
        self.register_buffer("delta", delta, persistent=False)

    def first_values(self, block: Tensor) -> dict[str, Tensor]:
        """Begin with the paper's bounds; a group without spread has its largest magnitude for three deviations."""
        reach = 3 * block.std(dim=1, correction=0)
        reach = torch.where(reach > LEAST, reach, block.abs().amax(dim=1)).clamp_min(LEAST)
        codes = Round.apply(normalized(block, -reach, reach), self.steps, self.delta)
        units = self.levels(codes, torch.full_like(reach, 2 / self.steps))
        output = block.abs().mean(dim=1) / units.abs().mean(dim=1)
        return {"lower": -reach, "upper": reach, "output": output.clamp_min(LEAST)}

    def codes_and_scale(self, block: Tensor, lower: Tensor, upper: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Find the levels, with EWGS's gradient, and their scale."""
        codes = Round.apply(normalized(block, lower, upper), self.steps, self.delta)
        if self.watched is not None:
            self.watched.append(codes)
        return codes, output.abs() * (2 / self.steps)

    def train_block(self, block: Tensor, **values: Tensor) -> Tensor:
        """Take the levels, with EWGS's gradient to the block and a scaled one to what is learned."""
        factor = (block.shape[1] * self.steps) ** -0.5
        values = {name: ScaledGradient.apply(value, factor) for name, value in values.items()}
        return self.levels(*self.codes_and_scale(block, **values))


class EWGSInputs(LearnedInputs):
    """Quantizes the input of a layer to L levels from l to u, learned: `l + (u − l) x_q`.

    The paper feeds x_q to the layer and rescales its output. Here what the mapping took is put back, so that the layer
    keeps its scale, signed inputs stay signed, and zero padding stays zero. l begins with the smallest input of the
    first batch, u with `3 std / √(1 − 2/π)`, three deviations of what went into a ReLU.
    """

    watched: list[Tensor] | None = None

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        self.steps = 2**self.settings.bits - 1
        self.lower, self.upper = (nn.Parameter(torch.full((1,), end, dtype=torch.float32)) for end in (0.0, 1.0))
        self.register_buffer("delta", torch.full((), self.settings.delta, dtype=torch.float32))

    def begin(self, inputs: Tensor) -> None:
        """Take the bounds of a batch."""
        low = -largest(-inputs.amin().reshape(1))
        wide = inputs.double()
        mean, square = averaged(torch.stack([wide.mean(), wide.square().mean()])).float()
        deviation = (square - mean.square()).clamp_min(0).sqrt()
        self.lower.copy_(low)
        self.upper.copy_(torch.maximum(3 * deviation / HALF_NORMAL, low + LEAST))

    def rounded(self, inputs: Tensor) -> Tensor:
        """Map to [0, 1], round there, and map back."""
        factor = (inputs[0].numel() * self.steps) ** -0.5
        lower, upper = (ScaledGradient.apply(value.float(), factor) for value in (self.lower, self.upper))
        codes = Round.apply(normalized(inputs.reshape(1, -1), lower, upper), self.steps, self.delta)
        if self.watched is not None:
            self.watched.append(codes)
        return (lower + codes * ((upper - lower) / self.steps)).view(inputs.shape)
