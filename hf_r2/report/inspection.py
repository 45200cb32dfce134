"""Statistics of the weights in a checkpoint's files, one tensor at a time and without the model."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from transformers import AutoConfig, PreTrainedModel

from hf_r2.codecs import Encoded, decode
from hf_r2.codecs.encoded import blank
from hf_r2.quantization.config import R2QuantizationConfig
from hf_r2.quantization.skeleton import names_in_model, skeleton
from hf_r2.quantization.tensor_files import DTYPES, StoredTensor, checkpoint_files, stored_tensors
from hf_r2.report.statistics import WeightStatistics, tensor_statistics
from hf_r2.selection import output_first, select_weights


@dataclass(frozen=True)
class Inspected:
    """The statistics of one weight, and how it is stored.

    Args:
        statistics: of the weight; of a compressed one, decoded.
        bits_per_weight: bits that it takes in the file, with its codebook.
    """

    statistics: WeightStatistics
    bits_per_weight: float


@dataclass(frozen=True)
class StoredWeight:
    """One weight of a checkpoint's files, before it is read.

    Args:
        name: parameter name, or that of the tensor in the file.
        storage: how it is stored, such as `"float32"` or `"palette 2-bit"`.
        compressed: whether it is compressed.
        bits_per_weight: bits that it takes in the file, with its codebook.
        read: reads the weight, and decodes it if it is compressed. Raises ValueError if the file does not hold it so.
    """

    name: str
    storage: str
    compressed: bool
    bits_per_weight: float
    read: Callable[[], Tensor]


def inspect_checkpoint(source: str) -> Iterator[Inspected]:
    """Measure the weights of a float or a compressed checkpoint one after another; see [`stored_weights`].

    Args:
        source: directory or Hub name of a checkpoint in safetensors.

    Raises:
        ValueError: without safetensors files, for damaged ones, for a quantization that is not of hf_r2, and for
            weights with NaN or infinite values.
    """
    for weight in stored_weights(source):
        yield Inspected(tensor_statistics(weight.name, weight.read()), weight.bits_per_weight)


def stored_weights(source: str) -> Iterator[StoredWeight]:
    """List the weights of a float or a compressed checkpoint, reading none.

    Weights are those that [`select_weights`] chooses, or that the checkpoint has compressed. Of a model that this
    transformers does not know, or whose weights it makes of several tensors, they are all float tensors of at least two
    dimensions.

    Args:
        source: directory or Hub name of a checkpoint in safetensors.

    Raises:
        ValueError: without safetensors files, for damaged ones, and for a quantization that is not of hf_r2.
    """
    stored = {name: tensor for file in checkpoint_files(source) for name, tensor in stored_tensors(file).items()}
    quantization = _quantization(source)
    if quantization is not None:
        yield from _compressed(source, R2QuantizationConfig(**quantization), stored)
        return
    for name, tensor in _floats(source, stored).items():
        dtype = str(DTYPES.get(tensor.dtype, tensor.dtype)).removeprefix("torch.")
        bits = 8 * tensor.nbytes / max(math.prod(tensor.shape), 1)
        yield StoredWeight(name, dtype, False, bits, tensor.read)


def _quantization(source: str) -> dict[str, object] | None:
    """Return the quantization config of a checkpoint; None for a float one, and for one without a known config."""
    try:
        return getattr(AutoConfig.from_pretrained(source), "quantization_config", None)
    except (ValueError, OSError):
        return None


def _floats(source: str, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    try:
        model = skeleton(source)
        names = list(select_weights(model))
    except (ValueError, OSError):
        names = []
    if names:
        found = _named_as_in(model, stored)
        if found.keys() >= set(names):
            return {name: found[name] for name in names}
    matrices = {name: tensor for name, tensor in stored.items() if len(tensor.shape) > 1 and _is_float(tensor)}
    if not matrices:
        raise ValueError(f"{source} holds no float tensor of two dimensions or more: there is nothing to inspect")
    return matrices


def _named_as_in(model: PreTrainedModel, stored: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    names = names_in_model(model, stored)
    return {names[name]: tensor for name, tensor in stored.items()}


def _is_float(tensor: StoredTensor) -> bool:
    return tensor.dtype in DTYPES and DTYPES[tensor.dtype].is_floating_point


def _compressed(source: str, config: R2QuantizationConfig, stored: dict[str, StoredTensor]) -> Iterator[StoredWeight]:
    model = skeleton(source)
    stored = _named_as_in(model, stored)
    dtype = getattr(torch, str(model.config.dtype).removeprefix("torch."))
    for name, (module, attribute) in select_weights(model, config.include, config.skip, config.min_numel).items():
        encoded = blank(output_first(module, getattr(module, attribute)).shape, dtype, config.settings_for(name))
        storage = f"{encoded.settings.method} {encoded.bits}-bit"
        read = partial(_decoded, name, module, encoded, stored)
        yield StoredWeight(name, storage, True, encoded.bits_per_weight, read)


def _decoded(name: str, module: nn.Module, like: Encoded, stored: dict[str, StoredTensor]) -> Tensor:
    """Read a compressed weight and decode it, in the shape of the module's parameter."""
    tensors = {key: _like(key, tensor, stored) for key, tensor in like.tensors(name).items()}
    codes = tensors.pop(name)
    codebook = {key.removeprefix(f"{name}_"): tensor for key, tensor in tensors.items()}
    return output_first(module, decode(replace(like, codes=codes, codebook=codebook)))


def _like(name: str, expected: Tensor, stored: dict[str, StoredTensor]) -> Tensor:
    """Read a tensor of a compressed weight, if it has the dtype and shape that the config asks for."""
    found = stored.get(name)
    if found is None or found.shape != tuple(expected.shape) or DTYPES.get(found.dtype) != expected.dtype:
        raise ValueError(
            f"the files do not hold {name!r} as config.json describes it: download or save the checkpoint again"
        )
    return found.read()
