"""Layers as matrix products: every output position is the weight matrix times one row of inputs.

Rows of a linear layer are its input vectors, those of a convolution its windows. In groups (depthwise ones, too) every
group has a matrix of its own.
"""

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

LINEAR = (nn.Linear, Conv1D)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def is_matrix_layer(module: nn.Module) -> bool:
    """Tell whether a module multiplies its inputs with its weight; an embedding does not."""
    return isinstance(module, (*LINEAR, *CONVOLUTIONS))


def group_count(layer: nn.Module) -> int:
    """Count the groups of a layer's channels."""
    return layer.groups if isinstance(layer, CONVOLUTIONS) else 1


def matrices(layer: nn.Module, weight: Tensor) -> Tensor:
    """View a weight `(out, in / groups, …)`, output channels first, as `(groups, out / groups, n)`."""
    groups = group_count(layer)
    return weight.reshape(groups, weight.shape[0] // groups, -1)


def output_rows(layer: nn.Module, outputs: Tensor) -> Tensor:
    """View outputs as `(positions, out)`, example by example."""
    channel = 1 if isinstance(layer, CONVOLUTIONS) else -1
    return outputs.movedim(channel, -1).flatten(0, -2)


def input_rows(layer: nn.Module, inputs: Tensor, positions: Tensor) -> Tensor:
    """Take the inputs that some output positions are computed from.

    Args:
        layer: linear layer or convolution, of any kernel, stride, padding, dilation and groups.
        inputs: as the layer gets them.
        positions: indices into [`output_rows`], `(rows,)`.

    Returns:
        `(rows, groups, n)`. Only the padded input is built beside them, not all windows.
    """
    if isinstance(layer, LINEAR):
        return inputs.flatten(0, -2)[positions][:, None]
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = nn.functional.pad(inputs, layer._reversed_padding_repeated_twice, mode=mode)
    axes = len(layer.kernel_size)
    for axis, (size, stride, dilation) in enumerate(
        zip(layer.kernel_size, layer.stride, layer.dilation, strict=True), start=2
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    example, *place = torch.unravel_index(positions, (len(inputs), *windows.shape[2 : 2 + axes]))
    return windows[example, :, *place].reshape(len(positions), layer.groups, -1)


def multiply(rows: Tensor, matrix: Tensor) -> Tensor:
    """Multiply rows `(rows, groups, n)` with matrices `(groups, out / groups, n)`: `(rows, out)`, without bias."""
    return torch.einsum("rgn,gon->rgo", rows, matrix).flatten(1)


def response(layer: nn.Module, weight: Tensor, constant: Tensor) -> Tensor:
    """Answer of a layer without bias to inputs that are constant in every channel.

    Args:
        layer: linear layer or convolution; padding counts as constant, too.
        weight: its weight, output channels first.
        constant: `(in,)`.

    Returns:
        `(out,)`.
    """
    groups = group_count(layer)
    summed = weight.flatten(2).sum(dim=2) if weight.dim() > 2 else weight
    return multiply(constant.view(1, groups, -1), matrices(layer, summed))[0]
