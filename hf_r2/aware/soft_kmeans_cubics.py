"""Tables for rows that are not long: functions that are a cubic between two nodes, in a bin as wide."""

from typing import NamedTuple

import torch
from torch import Tensor

from hf_r2.aware.soft_kmeans_bins import (
    COUNTED_PIECE,
    CROWD,
    Bins,
    LookUp,
    Scratch,
    bands_of,
    piece_size,
    tell_apart_,
)
from hf_r2.aware.soft_kmeans_interpolation import add_to_nodes, around_cells, cubic_shares, node_numbers
from hf_r2.aware.soft_kmeans_nodes import Nodes
from hf_r2.aware.soft_kmeans_steps import Scaled, Step
from hf_r2.fusing import fused


class CubicTable(NamedTuple):
    """What the passes over all elements of a block need.

    Args:
        bins: of all groups.
        crowded: whether sums over a bin are taken in float64.
        nodes: a bin apart, see `hf_r2.aware.soft_kmeans_interpolation`.
        steps: the iterations.
    """

    bins: Bins
    crowded: bool
    nodes: Nodes
    steps: list[Step]

    @classmethod
    def run(cls, block: Tensor, start: Tensor, scaled: Scaled, low: Tensor, high: Tensor, count: int) -> "CubicTable":
        """Cut the elements of a block into a number of bins and run soft k-means on them; see [`tabulate`]."""
        bins = Bins.of(low, high, count)
        points = scaled.inward((bins.low.double() + node_numbers(count) / bins.per_unit.double())[:, None])
        points = points.to(scaled.arithmetic(block))
        weights, crowded = torch.empty_like(points), False
        for rows, pieces in bands_of(block, size=COUNTED_PIECE):
            own, parts = bins.of_groups(rows), list(pieces)
            sums = own.powers(parts, torch.float32)
            if sums[0].max().item() > block.shape[1] * CROWD:
                crowded, sums = True, own.powers(parts, torch.float64)
            weights[rows] = _to_nodes(sums)
        nodes = Nodes(points, weights, scaled)
        return cls(bins, crowded, nodes, nodes.iterate(start))

    @property
    def large(self) -> tuple[()]:
        """See [`LineTable.large`]: there are none."""
        return ()

    def holding(self) -> "CubicTable":
        """See [`LineTable.holding`]."""
        return self

    def node_sums(self, block: Tensor, grad: Tensor) -> Tensor:
        """Sum the output's gradient over what the nodes stand for."""
        result, dtype = torch.empty_like(self.nodes.points), torch.float64 if self.crowded else torch.float32
        for rows, pieces in bands_of(block, grad, size=COUNTED_PIECE):
            result[rows] = _to_nodes(self.bins.of_groups(rows).powers(pieces, dtype))
        return result

    def write(self, target: Tensor, values: Tensor, compiled: bool, block: Tensor, *factor: Tensor) -> None:
        """See [`LineTable.write`]."""
        write = write_fused if compiled else Cubics().write
        for rows, pieces in bands_of(target, block, *factor, size=piece_size(block.shape[1] if compiled else 0)):
            tables = _coefficients(values[rows])
            for piece in pieces:
                write(tables, self.bins.of_groups(rows), *piece)


def _to_nodes(sums: Tensor) -> Tensor:
    """Distribute values of bins to nodes as cubic interpolation between them does.

    Args:
        sums: of values times powers 0 to 3 of the places in a bin, `(4, groups, bins)`.

    Returns:
        Values of the nodes, `(groups, 1, nodes)`.
    """
    return add_to_nodes(torch.mm(cubic_shares().to(sums.dtype).T, sums.view(4, -1)).view_as(sums))


def _coefficients(values: Tensor) -> list[Tensor]:
    """Interpolate functions `(groups, m, nodes)` by cubics: for each, coefficients `(groups, bins, 4)` in float32."""
    return [each.contiguous() for each in (around_cells(values.float()) @ cubic_shares().T).unbind(1)]


class Cubics:
    """Evaluates one function, or two of which one is multiplied, piece by piece."""

    def __init__(self) -> None:
        self._look_ups, self._scratch = (LookUp(), LookUp()), Scratch()

    def write(self, tables: list[Tensor], bins: Bins, target: Tensor, piece: Tensor, *factor: Tensor) -> None:
        """Write `f(piece)`, or with a factor `factor · f(piece) + g(piece)`; all are `(rows, n)`.

        Args:
            tables: coefficients of each function in every bin, `(rows, bins, 4)`, float32.
            bins: of these rows.
            target: where to, of any dtype.
            piece: the elements.
            *factor: none or one.
        """
        place = bins.place(piece, self._scratch)
        number = tell_apart_(self._scratch("number", piece, torch.int32).copy_(place), bins.count)
        t = place.frac_()
        values = []
        for name, table, look_up in zip(("first", "second"), tables, self._look_ups, strict=False):
            constant, linear, square, cube = look_up(table, number)
            value = torch.addcmul(square, cube, t, out=self._scratch(name, piece, torch.float32))
            torch.addcmul(linear, value, t, out=value)
            values.append(torch.addcmul(constant, value, t, out=value))
        result = torch.addcmul(values[1], values[0], *factor, out=values[1]) if factor else values[0]
        target.copy_(result)


def write_fused(tables: list[Tensor], bins: Bins, target: Tensor, piece: Tensor, *factor: Tensor) -> None:
    """Do what [`Cubics.write`] does in one pass without temporaries, by `torch.compile`."""
    first = torch.arange(len(piece), dtype=torch.int32)[:, None] * bins.count
    fused(_write)(target, [table.flatten(0, 1) for table in tables], first, bins.low, bins.per_unit, piece, *factor)


def _write(
    target: Tensor,
    tables: list[Tensor],
    first: Tensor,
    low: Tensor,
    per_unit: Tensor,
    piece: Tensor,
    *factor: Tensor,
) -> None:
    place = (piece.float() - low) * per_unit
    number = place.int()
    t, at = place - number, number + first
    values = [((table[at, 3] * t + table[at, 2]) * t + table[at, 1]) * t + table[at, 0] for table in tables]
    target.copy_(values[0] * factor[0] + values[1] if factor else values[0])
