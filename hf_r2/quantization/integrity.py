"""What tells a sound checkpoint from a damaged one."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_DAMAGED = "the checkpoint is damaged or was changed by hand; download or save it again"


def content_digests(codes: Mapping[str, Tensor], rest: Mapping[str, Tensor]) -> dict[str, Any]:
    """Digest a checkpoint's tensors: the codes and codebooks, and all others.

    Args:
        codes: packed codes and codebooks by tensor name.
        rest: every other tensor by name.

    Returns:
        `codes` and `rest`, hexadecimal SHA-256 digests, and `rest_dtypes`, the dtypes that `rest` was taken in.

    """
    return {"codes": _digest(codes), "rest": _digest(rest), "rest_dtypes": _dtypes(rest.values())}


def verify_content(codes: Mapping[str, Tensor], rest: Mapping[str, Tensor], recorded: Mapping[str, Any]) -> None:
    """Compare loaded tensors with the digests of their checkpoint.

    The other tensors are skipped when they were loaded in another dtype than they were saved in, as `dtype=` does, or
    not into memory, as an offloading `device_map` does.

    Raises:
        ValueError: if a bit differs.

    """
    if _digest(codes) != recorded.get("codes"):
        raise ValueError(f"the compressed weights do not match their SHA-256: {_DAMAGED}")
    comparable = _dtypes(rest.values()) == recorded.get("rest_dtypes")
    if comparable and not any(tensor.is_meta for tensor in rest.values()) and _digest(rest) != recorded.get("rest"):
        raise ValueError(f"the uncompressed tensors do not match their SHA-256: {_DAMAGED}")


def check_files(files: Iterable[str]) -> None:
    """Check that safetensors files are as long as their headers say, before anything reads them.

    Raises:
        ValueError: for a truncated file or a header that is not one.

    """
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise ValueError(f"{path.name} is not a safetensors file, the only kind that hf_r2 writes: {_DAMAGED}")
        size = path.stat().st_size
        try:
            with path.open("rb") as handle:
                header_size = int.from_bytes(handle.read(8), "little")
                if header_size > size - 8:
                    raise ValueError("its header is cut off")
                header = json.loads(handle.read(header_size))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
            raise ValueError(f"{path.name} is not a sound safetensors file ({error}): {_DAMAGED}") from error
        expected = 8 + header_size + max(ends, default=0)
        if size != expected:
            raise ValueError(f"{path.name} has {size} bytes where its header says {expected}: {_DAMAGED}")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        if not tensor.is_meta:
            digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _dtypes(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
