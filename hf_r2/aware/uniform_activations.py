"""Inputs of layers on equally spaced grids, whose range is measured: at any time, or beforehand."""

import torch
from torch import Tensor

from hf_r2.aware.activation_settings import ActivationSettings
from hf_r2.aware.gradients import StraightThrough
from hf_r2.aware.input_quantizer import InputQuantizer
from hf_r2.codecs import CodecSettings
from hf_r2.codecs.uniform import code_limits, grid_of, nearest


class UniformInputs(InputQuantizer):
    """Rounds inputs to the grid between the smallest and the largest of them (see `hf_r2.codecs.uniform`).

    The grid is affine, or symmetric with the same number of levels on both sides of zero, and has zero in it. Dynamic
    ranges are those of every example, or of every token, so that no example depends on another; the static one is that
    of the layer. The gradient passes where an input is not clipped, straight through.
    """

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        self.grid = CodecSettings("uniform", settings.bits, symmetric=settings.symmetric)
        self.static = settings.range == "static"
        if self.static:
            self.register_buffer("low", torch.zeros((), dtype=torch.float32))
            self.register_buffer("high", torch.zeros((), dtype=torch.float32))
            self.register_buffer("batches", torch.zeros((), dtype=torch.int64))

    def quantized(self, inputs: Tensor) -> Tensor:
        """Quantize float32 inputs."""
        tokens = self.by_token and self.settings.grain == "token"
        groups = inputs.reshape(-1, inputs.shape[-1]) if tokens else inputs.flatten(1)
        values = groups.detach()
        low, high = values.amin(dim=1), values.amax(dim=1)
        if self.static:
            if self.training or self.observing:
                self._observe(low.amin(), high.amax())
            self.require_statistics(inputs)
            low, high = self.low.float()[None], self.high.float()[None]
        scale, offset = grid_of(low, high, self.grid)
        codes = nearest(values, scale, offset[:, None], self.grid)
        rounded = (codes - offset[:, None]) * scale[:, None]
        # Half a step beyond the outer levels still rounds to them; what is farther away is clipped
        first, last = code_limits(self.grid)
        lowest, highest = (first - 0.5 - offset) * scale, (last + 0.5 - offset) * scale
        inside = (values >= lowest[:, None]) & (values <= highest[:, None])
        return StraightThrough.apply(groups * inside, rounded).view(inputs.shape)

    def restart(self) -> None:
        """Observe from here on, and take the range of all batches."""
        super().restart()
        self.low.fill_(torch.inf)
        self.high.fill_(-torch.inf)

    def _observe(self, low: Tensor, high: Tensor) -> None:
        """Take a batch into the range: calibration covers it, training averages."""
        share = self.new_share()
        if self.observing:
            self.low.copy_(torch.minimum(self.low, low))
            self.high.copy_(torch.maximum(self.high, high))
        else:
            self.low.lerp_(low, share)
            self.high.lerp_(high, share)
