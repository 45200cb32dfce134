"""Codes of 1–8 bits as a dense stream of bytes.

Bit j of code i is bit `i·bits + j` of the stream, and bit k of the stream is bit `k mod 8` of byte `k div 8`: codes
follow each other without gaps, least significant bit first. The unused bits of the last byte are zero.
"""

import torch
from torch import Tensor

_CHUNK = 1 << 20  # codes handled at a time (a multiple of 8): int64 words of a chunk take as many bytes


def packed_size(count: int, bits: int) -> int:
    """Count the bytes that `count` codes take."""
    return (count * bits + 7) // 8


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Args:
        codes: uint8, any shape, values below `2**bits`.
        bits: 1–8.

    Returns:
        uint8 of shape `(packed_size(codes.numel(), bits),)`.
    """
    codes = codes.reshape(-1)
    packed = torch.empty(packed_size(codes.numel(), bits), dtype=torch.uint8, device=codes.device)
    for start in range(0, codes.numel(), _CHUNK):
        chunk = codes[start : start + _CHUNK]
        padded = torch.nn.functional.pad(chunk, (0, -chunk.numel() % 8)).view(-1, 8)
        octets = _pack_bytes(padded, bits) if 8 % bits == 0 else _pack_words(padded, bits)
        first = start * bits // 8
        packed[first : first + packed_size(chunk.numel(), bits)] = octets[: packed_size(chunk.numel(), bits)]
    return packed


def _pack_bytes(eights: Tensor, bits: int) -> Tensor:
    """Pack codes `(m, 8)` of which a whole number fills a byte."""
    columns = eights.view(-1, 8 // bits).unbind(dim=1)
    octets = columns[0].clone()
    for index, column in enumerate(columns[1:], start=1):
        octets |= column << (index * bits)
    return octets


def _pack_words(eights: Tensor, bits: int) -> Tensor:
    """Pack codes `(m, 8)` of any width: eight of b bits fill b bytes exactly, and one 64-bit word holds them."""
    words = (eights.long() << (torch.arange(8, device=eights.device) * bits)).sum(dim=1)
    return torch.stack([(words >> (8 * byte)) & 255 for byte in range(bits)], dim=1).to(torch.uint8).view(-1)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Unpack the first `count` codes of a packed stream: the inverse of [`pack`].

    Args:
        packed: uint8, shape `(packed_size(count, bits),)`.
        bits: 1–8.
        count: number of codes.

    Returns:
        uint8 of shape `(count,)`.

    Raises:
        ValueError: if the stream has another dtype or length.
    """
    expected = packed_size(count, bits)
    if packed.dtype != torch.uint8 or packed.shape != (expected,):
        raise ValueError(
            f"{count} codes of {bits} bits are {expected} bytes (uint8), got {packed.dtype} {tuple(packed.shape)}"
        )
    codes = torch.empty(count, dtype=torch.uint8, device=packed.device)
    octets_per_chunk = _CHUNK // 8 * bits
    for index, start in enumerate(range(0, count, _CHUNK)):
        octets = packed[index * octets_per_chunk : (index + 1) * octets_per_chunk]
        values = _unpack_bytes(octets, bits) if 8 % bits == 0 else _unpack_words(octets, bits)
        stop = min(start + _CHUNK, count)
        codes[start:stop] = values[: stop - start]
    return codes


def _unpack_bytes(octets: Tensor, bits: int) -> Tensor:
    values = octets.new_empty(octets.numel(), 8 // bits)
    for index, column in enumerate(values.unbind(dim=1)):
        column.copy_((octets >> (index * bits)).bitwise_and_((1 << bits) - 1))
    return values.view(-1)


def _unpack_words(octets: Tensor, bits: int) -> Tensor:
    octets = torch.nn.functional.pad(octets, (0, -octets.numel() % bits)).view(-1, bits).long()
    words = (octets << (torch.arange(bits, device=octets.device) * 8)).sum(dim=1)
    values = (words[:, None] >> (torch.arange(8, device=octets.device) * bits)) & ((1 << bits) - 1)
    return values.view(-1).to(torch.uint8)
