"""Cubic interpolation between nodes a cell apart, where each cell lies amid its four nodes, and its adjoint.

The first node lies one before the first cell, the last one after the end of the last: cells + 3 nodes.
"""

from functools import cache

import torch
from torch import Tensor


def node_numbers(cells: int) -> Tensor:
    """Return where the nodes lie, in cells from the start of the first one: `(nodes,)`, float64."""
    return torch.arange(-1, cells + 2, dtype=torch.float64)


@cache
def cubic_shares() -> Tensor:
    """Shares of a cell's four nodes in a value at t of its width: coefficients of t⁰ to t³, `(4, nodes)`, float32."""
    third, sixth = 1 / 3, 1 / 6
    powers = [
        [0, 1, 0, 0],
        [-third, -0.5, 1, -sixth],
        [0.5, -1, 0.5, 0],
        [-sixth, 0.5, -0.5, sixth],
    ]
    return torch.tensor(powers, dtype=torch.float32, device="cpu")


def around_cells(values: Tensor) -> Tensor:
    """View values of the nodes `(…, nodes)` as those of each cell's four, `(…, cells, 4)`."""
    return values.unfold(-1, 4, 1)


def add_to_nodes(shares: Tensor) -> Tensor:
    """Add up what the cells give each of their four nodes, `(4, groups, cells)`: `(groups, 1, nodes)`."""
    _, groups, cells = shares.shape
    result = shares.new_zeros(groups, 1, cells + 3)
    for number, share in enumerate(shares):
        result[:, 0, number : number + cells] += share
    return result
