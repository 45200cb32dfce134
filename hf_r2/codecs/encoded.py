"""One weight through its codec and back."""

from collections.abc import Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor

from hf_r2.codecs import least_squares, palette, uniform
from hf_r2.codecs.bitpack import pack, packed_size, unpack
from hf_r2.codecs.settings import METHODS, CodecSettings
from hf_r2.grain import Grain

_BAND = 1 << 20  # elements decoded at a time

CODECS: dict[str, ModuleType] = dict(zip(METHODS, (uniform, palette, least_squares), strict=True))


class SettingsByName(Protocol):
    """Anything that knows the settings of a weight: `CodecSettings` itself or an `R2QuantizationConfig`."""

    def settings_for(self, name: str | None) -> CodecSettings:
        """Return the settings of the weight of this name."""


@dataclass
class Encoded:
    """A compressed weight.

    Args:
        codes: packed codes, uint8, flat (see `hf_r2.codecs.bitpack`).
        codebook: tensors of the codec by name: `scale` and `zero` (uniform), `lut` (palette), `basis` (least_squares).
        shape: shape of the weight, output channels first.
        dtype: dtype of the weight.
        settings: the codec's settings.
    """

    codes: Tensor
    codebook: dict[str, Tensor]
    shape: torch.Size
    dtype: torch.dtype
    settings: CodecSettings

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.settings.bits

    @property
    def grain(self) -> Grain:
        """Which elements share a codebook entry."""
        return self.settings.grain

    def codebook_like(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return the shapes and dtypes of the codebook tensors by name, as the shape and settings ask for them."""
        return CODECS[self.settings.method].codebook_like(self.shape, self.settings)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Return the packed codes and the codebook under the names that a checkpoint gives those of a weight."""
        return {name: self.codes, **{f"{name}_{key}": tensor for key, tensor in self.codebook.items()}}

    @property
    def code_count(self) -> int:
        """Number of codes: one for every element, or with a `cluster_dim` d one for up to d elements of a group."""
        return CODECS[self.settings.method].code_count(self.shape, self.settings)

    @property
    def nbytes(self) -> int:
        """Bytes of the packed codes and the codebook."""
        return self.codes.nbytes + sum(tensor.nbytes for tensor in self.codebook.values())

    @property
    def bits_per_weight(self) -> float:
        """True bits per weight: 4 bits at grain 32 with a float32 scale are (32 · 4 + 32) / 32 = 5.

        4 bits over 4 elements of a tensor of 4096, with a table of 16 vectors of 4 float32 values, are
        (1024 · 4 + 16 · 4 · 32) / 4096 = 1.5.
        """
        return 8 * self.nbytes / self.shape.numel()


def encode(weight: Tensor, config: SettingsByName, name: str | None = None) -> Encoded:
    """Compress one weight.

    Args:
        weight: `(out, in, …)`, output channels first, any float dtype.
        config: an `R2QuantizationConfig`, or `CodecSettings`.
        name: the weight's parameter name, for a config with overrides and for messages.

    Returns:
        Codes and codebook on the weight's device.

    Raises:
        ValueError: for a weight with NaN or infinite values or without elements.
    """
    weight = weight.detach()
    require_finite(weight, name)
    settings = config.settings_for(name)
    codes, codebook = CODECS[settings.method].quantize(weight, settings)
    return Encoded(pack(codes, settings.bits), codebook, weight.shape, weight.dtype, settings)


def blank(shape: torch.Size, dtype: torch.dtype, settings: CodecSettings) -> Encoded:
    """Return what a weight of this shape and dtype becomes, without its numbers: all tensors are on the meta device."""
    encoded = Encoded(torch.empty(0), {}, shape, dtype, settings)
    size = packed_size(encoded.code_count, settings.bits)
    encoded.codes = torch.empty(size, dtype=torch.uint8, device="meta")
    like = encoded.codebook_like().items()
    encoded.codebook = {key: torch.empty(size, dtype=dtype, device="meta") for key, (size, dtype) in like}
    return encoded


def require_finite(weight: Tensor, name: str | None = None) -> None:
    """Raise a ValueError with the name of a weight that has NaN or infinite values."""
    # The extremes are NaN if any element is; nothing of the weight's size is built
    if weight.numel() and not all(end.isfinite() for end in weight.aminmax()):
        label = f"weight {name!r}" if name else "the weight"
        raise ValueError(f"{label} has NaN or infinite values; the training that made it diverged")


def decode(encoded: Encoded) -> Tensor:
    """Restore a weight, with output channels first: float32 arithmetic, then its own dtype.

    This is the one quantize function: training simulates, evaluation measures and reloading restores
    `decode(encode(weight))`.

    Raises:
        ValueError: if the packed codes do not fit the shape.
    """
    weight = torch.empty(encoded.shape, dtype=encoded.dtype, device=encoded.codes.device)
    start = 0
    for band in bands(encoded):
        codes = unpack(band.codes, band.bits, band.code_count)
        restored = CODECS[band.settings.method].dequantize(codes, band.codebook, band.settings, band.shape)
        weight[start : start + len(restored)] = restored
        start += len(restored)
    return weight


def bands(encoded: Encoded) -> Iterator[Encoded]:
    """Cut a large compressed weight into some output channels at a time, so that what decodes it stays small.

    Vectors, and groups that do not divide a channel, do not follow the channels: such a weight stays whole.
    """
    channels, inputs = encoded.shape[0], torch.Size(encoded.shape[1:]).numel()
    settings = encoded.settings
    # Eight channels fill whole bytes
    rows = max(8, _BAND // max(inputs, 1) // 8 * 8)
    followed = settings.grain in ("tensor", "channel") or inputs % int(settings.grain) == 0
    if rows >= channels or settings.cluster_dim not in (None, 1) or not followed:
        yield encoded
        return
    if len(encoded.codes) != packed_size(encoded.code_count, encoded.bits):
        raise ValueError(f"the packed codes do not fit the shape {tuple(encoded.shape)}")
    octets = rows * inputs * settings.bits // 8
    groups = 1 if settings.grain == "channel" else 0 if settings.grain == "tensor" else inputs // int(settings.grain)
    for start in range(0, channels, rows):
        count = min(rows, channels - start)
        codes = encoded.codes[start // rows * octets :][: packed_size(count * inputs, settings.bits)]
        part = slice(start * groups, (start + count) * groups) if groups else slice(None)
        codebook = {key: tensor[part] for key, tensor in encoded.codebook.items()}
        yield Encoded(codes, codebook, torch.Size((count, *encoded.shape[1:])), encoded.dtype, settings)
