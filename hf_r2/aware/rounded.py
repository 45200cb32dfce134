"""Weights that no compression-aware method trains, but that are compressed in the end."""

import torch
from torch import Tensor, nn

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
        if not self.active or self.training:
            return weight
        decoded = decode(self.encoded(weight))
        return (decoded.T if self.transpose else decoded).contiguous()

    @torch.no_grad()
    def encoded(self, weight: Tensor) -> Encoded:
        """Compress the weight as it is now."""
        return encode(weight.T if self.transpose else weight, self.settings, self.name)

    def warnings(self, weight: Tensor) -> list[str]:
        """Nothing can go wrong here."""
        return []
