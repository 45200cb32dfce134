"""Gradients that are not the derivative of the value: what quantizers that train have in common."""

from typing import Any

import torch
from torch import Tensor


class StraightThrough(torch.autograd.Function):
    """A value with the gradient of another tensor: `apply(latent, value)` is `value`, its gradient goes to `latent`."""

    @staticmethod
    def forward(ctx: Any, latent: Tensor, value: Tensor) -> Tensor:
        """Return the value."""
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Pass the gradient on."""
        return grad, None


class ScaledGradient(torch.autograd.Function):
    """A tensor whose gradient is multiplied by a factor: `apply(tensor, factor)`."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, factor: Tensor | float) -> Tensor:
        """Return the tensor."""
        ctx.factor = factor
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Scale the gradient."""
        return grad * ctx.factor, None
