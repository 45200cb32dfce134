"""Safetensors files read and written one tensor at a time: memory follows the largest tensor, not the file."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

DTYPES = {
    "I64": torch.int64,
    "F64": torch.float64,
    "F32": torch.float32,
    "I32": torch.int32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Safetensors' words for dtypes, in the order in which its files list their tensors: those of more bytes first."""

DTYPE_WORDS = {dtype: word for word, dtype in DTYPES.items()}
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""Dtype, as safetensors' word, and shape of tensors by name."""

_CHUNK = 1 << 24  # bytes copied at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies.

    Args:
        path: its file.
        dtype: safetensors' word for its dtype.
        shape: its shape.
        start: byte of the file where it begins.
        nbytes: bytes that it takes.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    def read(self) -> Tensor:
        """Read the tensor into memory of its own.

        Raises:
            ValueError: for a dtype that has no place in torch, and for a file that has become shorter.
        """
        if self.dtype not in DTYPES:
            raise ValueError(f"{self.path} holds a tensor of dtype {self.dtype}, which hf_r2 does not read")
        octets = torch.empty(self.nbytes, dtype=torch.uint8)
        view = memoryview(octets.numpy())
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            done = 0
            while done < self.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ValueError(f"{self.path} ends too early: download or save it again")
                done += count
        return octets.view(DTYPES[self.dtype]).reshape(self.shape)

    def chunks(self) -> Iterator[bytes]:
        """Read its bytes, some at a time."""
        with open(self.path, "rb", buffering=0) as file:
            file.seek(self.start)
            left = self.nbytes
            while left:
                chunk = file.read(min(left, _CHUNK))
                if not chunk:
                    raise ValueError(f"{self.path} ends too early: download or save it again")
                left -= len(chunk)
                yield chunk


def stored_tensors(path: Path) -> dict[str, StoredTensor]:
    """List the tensors of a safetensors file by name, from its header alone.

    Raises:
        ValueError: for a file that is not whole or not well-formed.
    """
    try:
        # Checks that the offsets are those of the dtypes and shapes, without gaps, and end where the file ends
        with safe_open(path, framework="pt"):
            pass
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): download or save it again") from error
    header.pop("__metadata__", None)
    return {
        name: StoredTensor(path, entry["dtype"], tuple(entry["shape"]), 8 + size + start, end - start)
        for name, entry in header.items()
        for start, end in [entry["data_offsets"]]
    }


def checkpoint_files(source: str) -> list[Path]:
    """Find the safetensors files of a checkpoint, in a folder or in the Hub's cache, downloading what is not there.

    Raises:
        ValueError: if it has none.
    """
    index = _file(source, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        names = [SAFE_WEIGHTS_NAME]
    else:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    files = [_file(source, name) for name in names]
    missing = [name for name, file in zip(names, files, strict=True) if file is None]
    if missing:
        raise ValueError(f"{source} has no {missing[0]}: save it with save_pretrained, as safetensors")
    return [file for file in files if file is not None]


def _file(source: str, name: str) -> Path | None:
    found = cached_file(
        source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else Path(found)


def file_bytes(layout: Layout) -> int:
    """Bytes of a file with these tensors, its header included, as [`TensorWriter`] and `safetensors` write it."""
    return _lay_out(layout)[2]


def _lay_out(layout: Layout) -> tuple[bytes, dict[str, int], int]:
    """Make the head of a file: its bytes, where in the file every tensor begins, and where the file ends."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset, starts, ranks = 0, {}, list(DTYPES)
    for name, (word, shape) in sorted(layout.items(), key=lambda item: (ranks.index(item[1][0]), item[0])):
        starts[name] = offset
        offset += math.prod(shape) * DTYPES[word].itemsize
        header[name] = {"dtype": word, "shape": list(shape), "data_offsets": [starts[name], offset]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    head = len(text).to_bytes(8, "little") + text
    return head, {name: len(head) + start for name, start in starts.items()}, len(head) + offset


class TensorWriter:
    """Writes a safetensors file whose tensors come one by one, in any order, where the header says.

    The file has the bytes that `safetensors.torch.save_file` would write. Use it as a context manager: the file gets
    its name when the block ends without an error, and is gone otherwise.

    Args:
        path: the file.
        layout: dtype, as safetensors' word, and shape of every tensor that will come.
    """

    def __init__(self, path: Path, layout: Layout) -> None:
        self._path, self._scratch = path, path.with_name(f".{path.name}.partial-{os.getpid()}")
        self._head, self._starts, _ = _lay_out(layout)
        self._file: BinaryIO

    def __enter__(self) -> Self:
        self._file = open(self._scratch, "wb")
        self._file.write(self._head)
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write a tensor of the layout's dtype and shape."""
        self._file.seek(self._starts[name])
        self._file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())

    def copy(self, name: str, tensor: StoredTensor) -> None:
        """Copy a tensor from its file."""
        self._file.seek(self._starts[name])
        for chunk in tensor.chunks():
            self._file.write(chunk)

    def __exit__(self, kind: type[BaseException] | None, error: object, traceback: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            self._scratch.replace(self._path)
        else:
            self._scratch.unlink(missing_ok=True)
