"""The module that quantizes the input of a layer: what all of its kinds have in common."""

import torch
from torch import Tensor, distributed, nn

from hf_r2.aware.activation_settings import ActivationSettings


class InputQuantizer(nn.Module):
    """Replaces the input of a layer by quantized values: the same in training, evaluation and after reloading.

    Codes are not kept. What a checkpoint holds are the buffers and parameters of the quantizer, if it has any.

    Attributes:
        active: whether inputs are quantized yet.
        observing: whether batches count for running statistics in evaluation, too.

    Args:
        settings: how.
        by_token: whether the layer works on vectors of the last dimension (linear layers), or on examples.
    """

    penalized: tuple[str, ...] = ()
    """Names of the parameters that weight decay is meant for."""

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__()
        self.settings = settings
        self.by_token = by_token
        self.active = self.observing = False

    def forward(self, inputs: Tensor) -> Tensor:
        """Return inputs of the same shape and dtype, quantized in float32.

        Raises:
            ValueError: if the quantizer has no statistics or learned values yet.
        """
        if not self.active or inputs.numel() == 0:
            return inputs
        return self.quantized(inputs.float()).to(inputs.dtype)

    def quantized(self, inputs: Tensor) -> Tensor:
        """Quantize float32 inputs."""
        raise NotImplementedError

    def restart(self) -> None:
        """Observe from here on, in evaluation too, and let all batches count alike."""
        self.batches.zero_()
        self.observing = True

    def new_share(self) -> Tensor:
        """Count a batch, and return its share in a running average.

        The first batches count alike, as no average is worth keeping before them.
        """
        self.batches += 1
        return (1 / self.batches.float()).clamp_min(0.0 if self.observing else 1 - self.settings.momentum)

    def require_statistics(self, inputs: Tensor) -> None:
        """Raise a ValueError if no batch was seen; on a GPU, which would have to wait, nothing is checked."""
        if inputs.is_cpu and self.batches == 0:
            wish = f"moving_average={self.settings.moving_average!r}"
            wish = "range='static'" if self.settings.range == "static" else wish
            raise ValueError(f"{wish} has seen no data: train with it, or compress with a calibration_dataset")

    def extra_repr(self) -> str:
        """Show the settings."""
        return f"{self.settings.to_dict()}"


class LearnedInputs(InputQuantizer):
    """An input quantizer whose parameters are learned with the weights, from what the first batch of training says."""

    def __init__(self, settings: ActivationSettings, by_token: bool) -> None:
        super().__init__(settings, by_token)
        self.register_buffer("batches", torch.zeros((), dtype=torch.int64))
        self._begun = False

    def quantized(self, inputs: Tensor) -> Tensor:
        """Quantize float32 inputs; the first ones of training choose what is learned from there."""
        if not self._begun:
            # Asked only until it has: a GPU has to wait for the answer
            self._begun = bool(self.batches > 0)
        if not self._begun:
            if not self.training:
                raise ValueError(f"activations of method={self.settings.method!r} are learned: train with them first")
            with torch.no_grad():
                self.begin(inputs)
                self.batches += 1
            self._begun = True
        return self.rounded(inputs)

    def begin(self, inputs: Tensor) -> None:
        """Set the parameters by a first batch, float32."""
        raise NotImplementedError

    def rounded(self, inputs: Tensor) -> Tensor:
        """Quantize float32 inputs by the parameters."""
        raise NotImplementedError


def averaged(statistics: Tensor) -> Tensor:
    """Average statistics of a batch over all processes, so that what they begin with is the same."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(statistics)
        statistics /= distributed.get_world_size()
    return statistics


def largest(values: Tensor) -> Tensor:
    """Take the largest values of a batch over all processes."""
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(values, distributed.ReduceOp.MAX)
    return values
