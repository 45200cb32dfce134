"""How a weight is cut into groups that share a range or a codebook.

The one place that knows grains: losses, codecs and reports all cut with [`blocks`] and put back with [`join`].
A weight is always handed over with its output channels first (see `hf_r2.selection.output_first`).
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

Grain = str | int

EMPTY = "the weight has no elements; exclude it from the selection"

CPU_PIECE, DEVICE_PIECE = 1 << 17, 1 << 24
"""Elements of a piece: what stays in a core's cache, and what keeps a device's temporaries small."""


def parse_grain(grain: Grain) -> Grain:
    """Check a grain and return it in its normal form.

    Args:
        grain: `"tensor"` (one group), `"channel"` (one group per output channel) or a positive int g (groups of g
            consecutive inputs within an output channel). An int may come as a string, as command lines give it.

    Raises:
        ValueError: for anything else.
    """
    if isinstance(grain, str) and grain.isdecimal():
        grain = int(grain)
    if grain in ("tensor", "channel") or (isinstance(grain, int) and not isinstance(grain, bool) and grain > 0):
        return grain
    raise ValueError(f"unknown grain {grain!r}: use 'tensor', 'channel' or a positive group size such as 64")


def blocks(weight: Tensor, grain: Grain) -> list[Tensor]:
    """Cut a weight into one or two dense blocks of groups.

    Args:
        weight: `(out, in, …)`, any float or integer dtype; half precision and integers are raised to float32, so that
            statistics never run in half precision.
        grain: see [`parse_grain`]. The inputs of a channel are its remaining dimensions, flattened.

    Returns:
        Tensors of shape `(groups, elements of a group)`. Only an int grain that does not divide the inputs needs a
        second one: the shorter last group of every channel. Groups are counted through the blocks in order.

    Raises:
        ValueError: for an unknown grain, an empty weight, and channels or groups of fewer than two dimensions.
    """
    return cut(weight.to(torch.promote_types(weight.dtype, torch.float32)), grain)


def cut(weight: Tensor, grain: Grain) -> list[Tensor]:
    """Cut a weight, or its codes, into blocks as [`blocks`] does, but leave the dtype and, where it can, the memory."""
    grain = parse_grain(grain)
    if weight.numel() == 0:
        raise ValueError(EMPTY)
    if grain == "tensor":
        return [weight.reshape(1, -1)]
    if weight.dim() < 2:
        raise ValueError(f"grain {grain!r} needs a weight of at least two dimensions, got shape {tuple(weight.shape)}")
    rows = weight.flatten(1)
    return [rows[:, start:stop].reshape(-1, size) for start, stop, size in _spans(rows.shape[1], grain)]


def join(parts: Sequence[Tensor], shape: Sequence[int], grain: Grain) -> Tensor:
    """Put blocks of any dtype back into a weight of the given shape: the inverse of [`blocks`]."""
    if grain == "tensor":
        return parts[0].reshape(tuple(shape))
    rows = [part.reshape(shape[0], -1) for part in parts]
    return (rows[0] if len(rows) == 1 else torch.cat(rows, dim=1)).reshape(tuple(shape))


def pieces(*parts: Tensor) -> Iterator[tuple[slice, tuple[Tensor, ...]]]:
    """Walk over blocks of one shape together, piece by piece, so that temporaries stay small.

    Yields:
        The slice of the groups, and for each block a view `(those groups, some or all of their elements)`.
    """
    groups, n = parts[0].shape
    size = CPU_PIECE * torch.get_num_threads() if parts[0].is_cpu else DEVICE_PIECE
    rows = max(1, size // max(n, 1))
    for start in range(0, groups, rows):
        band = slice(start, start + rows)
        for column in range(0, n, size):
            yield band, tuple(part[band, column : column + size] for part in parts)


def group_counts(shape: Sequence[int], grain: Grain) -> list[int]:
    """Count the groups in each block of a weight of the given shape; their sum is the number of codebooks."""
    if grain == "tensor":
        return [1]
    inputs = torch.Size(shape[1:]).numel()
    return [shape[0] * (stop - start) // size for start, stop, size in _spans(inputs, grain)]


def group_sizes(shape: Sequence[int], grain: Grain) -> list[int]:
    """Elements of a group in each block of a weight of the given shape."""
    if grain == "tensor":
        return [torch.Size(shape).numel()]
    return [size for _, _, size in _spans(torch.Size(shape[1:]).numel(), grain)]


def _spans(inputs: int, grain: Grain) -> list[tuple[int, int, int]]:
    """Split the inputs of a channel into (start, stop, group size): whole groups, then what is left."""
    if inputs == 0:
        raise ValueError(EMPTY)
    size = inputs if grain == "channel" else min(int(grain), inputs)
    whole = inputs - inputs % size
    spans = [(0, whole, size)]
    if whole < inputs:
        spans.append((whole, inputs, inputs - whole))
    return spans
