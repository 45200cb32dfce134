"""Weights that stay packed in memory and are decoded anew whenever a layer computes with them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Self

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from hf_r2.codecs import Encoded, decode

_KEEP: ContextVar[bool] = ContextVar("keep_packed", default=False)


@contextmanager
def keep_packed() -> Iterator[None]:
    """Leave weights packed that are loaded, or compressed while loading, in this block.

        with keep_packed():
            model = AutoModelForCausalLM.from_pretrained("me/model-4bit")

    The model then takes about as much memory as its file, and while it computes that of its largest layer in addition;
    in exchange every forward pass decodes every weight. Results are those of a model that was decoded while loading,
    bit for bit. It is for inference: nothing of it requires a gradient. It saves and dequantizes as any other.
    """
    token = _KEEP.set(True)
    try:
        yield
    finally:
        _KEEP.reset(token)


def keeps_packed() -> bool:
    """Tell whether weights are to stay packed here."""
    return _KEEP.get()


class PackedWeight(nn.Module):
    """The parametrization that computes a weight from its codes.

    Args:
        encoded: the codes, which follow the layer to another device or dtype.
        turned: whether the layer has the output channels second.
    """

    def __init__(self, encoded: Encoded, turned: bool) -> None:
        super().__init__()
        self.encoded = encoded
        self.turned = turned

    def forward(self, original: Tensor) -> Tensor:
        """Decode the weight; there is no original."""
        weight = decode(self.encoded)
        return weight.T.contiguous() if self.turned else weight

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        # The weight's dtype follows `model.to(dtype)`, its codebook's does not
        encoded = self.encoded
        like = fn(torch.empty(0, dtype=encoded.dtype, device=encoded.codes.device))
        encoded.dtype = like.dtype
        encoded.codes = encoded.codes.to(like.device)
        encoded.codebook = {key: tensor.to(like.device) for key, tensor in encoded.codebook.items()}
        return super()._apply(fn, recurse)


def pack(module: nn.Module, encoded: Encoded, turned: bool) -> None:
    """Let a layer compute its weight from codes, in place of the one that it has."""
    module.weight = nn.Parameter(encoded.codes.new_empty(0), requires_grad=False)
    parametrize.register_parametrization(module, "weight", PackedWeight(encoded, turned), unsafe=True)


def is_packed(module: nn.Module) -> bool:
    """Tell whether a layer computes its weight from codes."""
    if not parametrize.is_parametrized(module, "weight"):
        return False
    return isinstance(module.parametrizations["weight"][0], PackedWeight)


def unpack_model(model: nn.Module) -> None:
    """Leave decoded weights, as plain parameters, wherever a layer computes its weight from codes."""
    for module in model.modules():
        if is_packed(module):
            weight = module.weight
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=False)
            module.weight = nn.Parameter(weight)
