"""What tells a sound checkpoint from a damaged one.

The config of a checkpoint carries four digests: of the codec settings by weight, of the layout of all tensors (dtypes
and shapes), of the codes with their codebooks, and of every other tensor. The first two are checked before any weight
is read.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_r2.codecs import Encoded
from hf_r2.quantization.tensor_files import DTYPE_WORDS, DTYPES

_DAMAGED = "the checkpoint is damaged or was changed by hand; download or save it again"
_RECORDED = ("settings", "layout", "codes", "rest", "rest_dtypes")


def content_digests(
    encoded: Mapping[str, Encoded], codes: Mapping[str, Tensor], rest: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Digest what a checkpoint is about to hold.

    Args:
        encoded: the compressed weights by parameter name.
        codes: their packed codes and codebooks by tensor name.
        rest: every other tensor by name.

    Returns:
        Hexadecimal SHA-256 digests `settings`, `layout`, `codes` and `rest`, and the dtypes of `rest` as `rest_dtypes`.
    """
    tensors = chain(codes.values(), rest.values())  # one at a time: they may be read as they are asked for
    return {
        "settings": _settings_digest(encoded),
        "layout": _layout_digest((DTYPE_WORDS.get(tensor.dtype, "other"), list(tensor.shape)) for tensor in tensors),
        "codes": _content_digest(codes),
        "rest": _content_digest(rest),
        "rest_dtypes": _dtypes(rest.values()),
    }


def verify_layout(files: Iterable[str], recorded: Mapping[str, Any] | None) -> None:
    """Check a checkpoint's files before their tensors are read: whole, well-formed, with the tensors that were saved.

    Raises:
        ValueError: for a truncated or malformed file, other tensors than were saved, or missing digests.
    """
    if not isinstance(recorded, Mapping) or not set(_RECORDED) <= set(recorded):
        raise ValueError(f"quantization_config has no complete sha256: {_DAMAGED}")
    layout = []
    for path in map(Path, files):
        if path.suffix != ".safetensors":
            raise ValueError(f"{path.name} is not a safetensors file, the only kind that hf_r2 writes: {_DAMAGED}")
        try:
            with safe_open(path, framework="pt") as file:
                slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118 (not a dict)
                layout += [(tensor.get_dtype(), list(tensor.get_shape())) for tensor in slices]
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path.name} cannot be read ({error}): {_DAMAGED}") from error
    known = ((dtype if dtype in DTYPES else "other", shape) for dtype, shape in layout)
    if layout and _layout_digest(known) != recorded["layout"]:
        raise ValueError(f"the files hold tensors of other dtypes or shapes than were saved: {_DAMAGED}")


def verify_settings(encoded: Mapping[str, Encoded], recorded: Mapping[str, Any]) -> None:
    """Check that the config still compresses the weights that it was saved with, as it did.

    Raises:
        ValueError: if a weight, its shape or a setting differs.
    """
    if _settings_digest(encoded) != recorded["settings"]:
        raise ValueError(f"config.json and the weights do not belong together: {_DAMAGED}")


def verify_content(codes: Mapping[str, Tensor], rest: Mapping[str, Tensor], recorded: Mapping[str, Any]) -> None:
    """Compare loaded tensors with the digests of their checkpoint.

    The other tensors are skipped when they were loaded in another dtype than they were saved in, as `dtype=` does.

    Raises:
        ValueError: if a bit differs.
    """
    if _content_digest(codes) != recorded["codes"]:
        raise ValueError(f"the compressed weights do not match their SHA-256: {_DAMAGED}")
    if _dtypes(rest.values()) == recorded["rest_dtypes"] and _content_digest(rest) != recorded["rest"]:
        raise ValueError(f"the uncompressed tensors do not match their SHA-256: {_DAMAGED}")


def _settings_digest(encoded: Mapping[str, Encoded]) -> str:
    return _json_digest({name: [list(weight.shape), weight.settings.to_dict()] for name, weight in encoded.items()})


def _layout_digest(tensors: Iterable[tuple[str, list[int]]]) -> str:
    """Digest dtypes and shapes without names, which transformers may change between memory and file."""
    return _json_digest(sorted(tensors))


def _json_digest(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _content_digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode())
        digest.update(tensor.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _dtypes(tensors: Iterable[Tensor]) -> list[str]:
    return sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
