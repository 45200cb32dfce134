"""Error-compensated rounding: later inputs make up for the rounding of earlier ones (Frantar et al., arXiv 2210.17323).

A weight matrix W should answer to its inputs as before: least ‖X W − X Ŵ‖², a quadratic form with H = Xᵀ X for every
output channel. Inputs are rounded in their order; with H⁻¹ = Uᵀ U, U upper triangular, the error of input j is

    e = (w_j − ŵ_j) / U_jj,    and all later inputs k > j move by −e U_jk

to where they are best, given what is rounded. The codebook of the codec, any codec, is found before and stays.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from hf_r2.codecs import CODECS, CodecSettings, Encoded, decode, encode
from hf_r2.codecs.bitpack import pack, unpack
from hf_r2.codecs.encoded import SettingsByName
from hf_r2.codecs.palette import nearest
from hf_r2.grain import blocks, group_counts, join
from hf_r2.refine.capture import Batches, Trace, run_to
from hf_r2.refine.matrices import group_count, input_rows, output_rows
from hf_r2.refine.sequence import round_in_sequence

_DAMPING = 0.01  # of the mean diagonal of H, added to it
_BLOCK = 128  # inputs whose errors are kept before they are spread over all later ones
_PIECE = 1 << 24  # elements of rows that are multiplied at a time


@torch.no_grad()
def compensate(
    model: nn.Module, selection: Mapping[str, tuple[nn.Module, str]], config: SettingsByName, batches: Batches
) -> dict[str, Encoded]:
    """Round weights with error compensation, layer by layer, each with inputs behind those that are rounded already.

    Args:
        model: float model; its weights become the compressed ones.
        selection: what `select_weights` returns.
        config: settings by name: any codec, but no palettes of vectors.
        batches: calibration data, without labels. Memory holds one matrix of inputs × inputs in float64.

    Returns:
        The compressed weights by name; those of layers that do not run are left out.

    Raises:
        ValueError: for palettes of vectors, and if there are no batches.
    """
    for name in selection:
        if (config.settings_for(name).cluster_dim or 1) > 1:
            raise ValueError(f"'compensate' rounds weights one by one: set cluster_dim=1 for {name!r}, or leave it out")

    def rounding(name: str, layer: nn.Module, weight: Tensor, settings: CodecSettings, found: Trace) -> Encoded:
        hessian = torch.zeros((), dtype=torch.float64, device=weight.device)
        for batch in batches:
            for inputs, outputs in run_to(model, layer, found.calls[name], batch):
                hessian = hessian + second_moments(layer, inputs, len(output_rows(layer, outputs)))
        return round_compensated(weight, encode(weight, settings, name), hessian)

    return round_in_sequence(model, selection, config, batches, rounding, "Rounding with compensation")


def second_moments(layer: nn.Module, inputs: Tensor, count: int) -> Tensor:
    """Return H = Σ x xᵀ over all `count` output positions of a layer: float64 `(groups, n, n)`."""
    width = layer.weight.numel() // layer.weight.shape[0] * group_count(layer)
    positions = torch.arange(count, device=inputs.device)
    total = torch.zeros((), dtype=torch.float64, device=inputs.device)
    for part in positions.split(max(1, _PIECE // width)):
        rows = input_rows(layer, inputs, part).double().transpose(0, 1)
        total = total + rows.mT @ rows
    return total


def round_compensated(weight: Tensor, plain: Encoded, hessian: Tensor) -> Encoded:
    """Round one weight with error compensation, by the codebook of its plain encoding.

    Args:
        weight: `(out, in / groups, …)`.
        plain: the weight, encoded one by one.
        hessian: H, float64 `(groups, n, n)`, positive semi-definite.

    Returns:
        The weight with new codes. No output channel has a greater error in H than by the plain codes.
    """
    groups = len(hessian)
    plain_codes = unpack(plain.codes, plain.bits, plain.code_count).view(plain.shape)
    matrix = weight.double().reshape(groups, len(weight) // groups, -1)
    tables = CODECS[plain.settings.method].levels(plain.codebook, plain.settings)
    owners = group_indices(plain).view_as(matrix)
    codes = compensated_codes(matrix, hessian, tables, owners).view(plain.shape)
    compensated = replace(plain, codes=pack(codes, plain.bits))
    errors = [
        ((difference @ hessian) * difference).sum(dim=-1).flatten()
        for difference in (decode(each).double().view_as(matrix) - matrix for each in (plain, compensated))
    ]
    better = (errors[1] < errors[0]).view(-1, *[1] * (weight.dim() - 1))
    return replace(plain, codes=pack(torch.where(better, codes, plain_codes), plain.bits))


def group_indices(encoded: Encoded) -> Tensor:
    """Name the group of the codebook that every element of a weight belongs to: int64, of its shape."""
    shape, grain = encoded.shape, encoded.grain
    counts = group_counts(shape, grain)
    like = blocks(torch.empty(shape, device=encoded.codes.device), grain)
    first = [sum(counts[:index]) for index in range(len(counts))]
    parts = [
        torch.arange(start, start + len(block), device=block.device)[:, None].expand_as(block)
        for start, block in zip(first, like, strict=True)
    ]
    return join(parts, shape, grain)


def compensated_codes(matrix: Tensor, hessian: Tensor, tables: Tensor, owners: Tensor) -> Tensor:
    """Round the inputs of matrices in order, and move the later ones to make up for it.

    Args:
        matrix: float64 `(groups, out / groups, n)`.
        hessian: H, float64 `(groups, n, n)`; damped by 1 % of its mean diagonal. Inputs that are always 0 count as 1.
        tables: values of all codes, float32 `(codebooks, codes)`, in any order.
        owners: codebook of every element, int64, of the matrix's shape.

    Returns:
        uint8 codes of the matrix's shape.
    """
    ordered, order = tables.sort(dim=1, stable=True)
    order = order.to(torch.uint8)
    upper = inverse_factor(hessian)
    left, codes = matrix.clone(), torch.empty(matrix.shape, dtype=torch.uint8, device=matrix.device)
    n = matrix.shape[2]
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        errors = []
        for j in range(start, stop):
            owner, column = owners[:, :, j].flatten(), left[:, :, j]
            index = nearest(column.float().view(-1, 1), ordered[owner]).long()
            codes[:, :, j] = order[owner].gather(1, index).view_as(column)
            rounded = ordered[owner].gather(1, index).view_as(column)
            errors.append((column - rounded) / upper[:, j, j, None])
            left[:, :, j + 1 : stop] -= errors[-1][:, :, None] * upper[:, None, j, j + 1 : stop]
        left[:, :, stop:] -= torch.stack(errors, dim=2) @ upper[:, start:stop, stop:]
    return codes


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper triangular U with Uᵀ U = H⁻¹, after damping, float64 `(groups, n, n)`."""
    diagonal = hessian.diagonal(dim1=1, dim2=2)
    damped = hessian.clone()
    unused = (diagonal == 0).double()
    damped.diagonal(dim1=1, dim2=2).add_(_DAMPING * diagonal.mean(dim=1, keepdim=True) + unused)
    return torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(damped)), upper=True)
