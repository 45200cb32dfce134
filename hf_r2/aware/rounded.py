"""Weights that no compression-aware method trains, but that are compressed in the end."""

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from hf_r2.codecs import CodecSettings, Encoded, decode, encode


class Rounded(nn.Module):
    """Parametrization of a weight that trains as it is, and is compressed after training.

    In evaluation it is the compressed weight already, so that what is evaluated is what is saved.

    Args:
        settings: of the codec.
        transpose: whether the layer keeps its output channels last (transformers' Conv1D).
        name: of the weight, for messages.
    """

    compression_aware = True

    trained: tuple[str, ...] = ()
    """Names of the buffers and parameters that training adjusts; checkpoints made in training hold them."""

    def __init__(self, settings: CodecSettings, transpose: bool, name: str) -> None:
        super().__init__()
        self.settings = settings
        self.transpose = transpose
        self.name = name
        self.active = False

    def start(self, weight: Tensor) -> None:
        """From here on, evaluate with the compressed weight."""
        self.active = True

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight in training, the compressed one in evaluation."""
        return weight if self.training or not self.active else self.decoded(self.encoded(weight))

    @torch.no_grad()
    def encoded(self, weight: Tensor) -> Encoded:
        """Compress the weight as it is now."""
        return encode(self.output_first(weight), self.settings, self.name)

    def decoded(self, encoded: Encoded) -> Tensor:
        """Return a compressed weight in the layout of the layer's.

        Contiguous as the stored weight will be: kernels sum in an order that depends on the layout.
        """
        return self.output_first(decode(encoded)).contiguous()

    def output_first(self, weight: Tensor) -> Tensor:
        """Put the output channels first, or back."""
        return weight.T if self.transpose else weight

    def require_whole(self, weight: Tensor, what: str) -> None:
        """Raise a ValueError for a weight that FSDP2 has cut, if what is trained needs all of it."""
        if isinstance(weight, DTensor):
            raise ValueError(
                f"{self.name} is cut by FSDP2, and {what} whole weights: train with DDP, or skip the weight"
            )

    def warnings(self, weight: Tensor) -> list[str]:
        """Nothing can go wrong here."""
        return []
